// expand_mask on the CPU; kernel.py says what it computes. The selection is csrc/groups.h.

#include <cpu.h>
#include <groups.h>
#include <order.h>
#include <pages.h>
#include <scores.h>
#include <tensors.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using namespace fedspa;

constexpr int64_t MOST_CLIENTS = std::numeric_limits<int32_t>::max();

// Equal votes go by index alone: the votes are the keys. A negative vote is refused, and only has
// to become a key at all.
struct Votes {
  const int32_t* votes;
  int32_t clients;
  bool* mask;

  FEDSPA_BODY bool load(int64_t begin, int64_t size, int32_t* keys) const {
    int32_t wrong = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t vote = votes[begin + i];
      keys[i] = vote & 0x7fffffff;
      wrong |= (vote < 0) | (vote > clients);
    }
    return wrong != 0;
  }

  template <class Key>
  FEDSPA_BODY void store(int64_t begin, int64_t size, const Key* keys, Key last) const {
    const int32_t* in = votes + begin;
    bool* kept = mask + begin;
    for (int64_t i = 0; i < size; ++i) {
      kept[i] = (keys[i] > last) & (in[i] != 0);
    }
  }
};

// Votes above, the score below: the score's key without its sign, moved up by 2^31.
template <class T>
struct ScoredVotes : Votes {
  const T* scores;

  FEDSPA_BODY bool load(int64_t begin, int64_t size, int64_t* keys) const {
    const int32_t* in = votes + begin;
    const T* score = scores + begin;
    int32_t wrong = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t key = order_key(order_bits(score[i]));
      const int64_t vote = in[i] & 0x7fffffff;
      keys[i] = vote << 32 | (static_cast<uint32_t>(key) ^ 0x80000000);
      wrong |= (in[i] < 0) | (in[i] > clients) | is_nan<T>(key);
    }
    return wrong != 0;
  }
};

std::tuple<Tensor, Tensor> expand_mask(const Tensor& votes, const std::optional<Tensor>& scores,
                                       int64_t clients, int64_t of, int64_t count,
                                       int64_t /*stream*/) {
  check_contiguous("expand_mask: votes", votes, ScalarType::Int);
  check_groups("expand_mask", votes, of, count);
  Tensor mask = new_output(votes, ScalarType::Bool);
  Tensor invalid = new_flag(votes);
  int32_t* const refused = mutable_data<int32_t>(invalid);
  const auto most = static_cast<int32_t>(std::min(clients, MOST_CLIENTS));
  const Votes entries{data<int32_t>(votes), most, mutable_data<bool>(mask)};
  const int64_t n = votes.numel();
  if (!scores.has_value()) {
    *refused = select_in_groups<int32_t>(n, of, count, entries);
    return {mask, invalid};
  }
  check_contiguous("expand_mask: scores", *scores, scores->scalar_type());
  STD_TORCH_CHECK(scores->numel() == n, "expand_mask: scores: needs the shape of votes");
  for_weight_dtype("expand_mask: scores", *scores, [&]<class T>() {
    const ScoredVotes<T> scored{entries, data<T>(*scores)};
    *refused = select_in_groups<int64_t>(n, of, count, scored);
  });
  return {mask, invalid};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("expand_mask", TORCH_BOX(&expand_mask));
}
