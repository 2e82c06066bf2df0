// Mask expansion on the GPU: votes and score make one key, the votes above. How the first of each
// group are found stands in csrc/groups.cuh; its digits skip what no number of clients can set.

#include <torch/csrc/stable/library.h>
#include <groups.cuh>

#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>
#include <type_traits>

namespace fedspa {
namespace {

struct NoScore {};

template <class Score>
constexpr int SCORE_BITS = KEY_BITS<Score>;
template <>
constexpr int SCORE_BITS<NoScore> = 0;

// votes (...), scores (...) -> mask (...), True = kept
template <class Score, class KeyType>
struct Votes {
  using Key = KeyType;
  using Element = Key;
  static constexpr int VECTOR = 4;
  static constexpr bool KEYS_ON_CHIP = false; // its elements are its keys

  const int* votes;
  const Score* scores;
  bool* mask;
  int* invalid;
  uint32_t clients;
  int bits;
  bool aligned;

  template <int N>
  __device__ void load(int64_t index, int valid, Key (&elements)[N]) const {
    int counted[N];
    read(votes + index, valid, aligned, counted);
    bool wrong = false;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      wrong = wrong || static_cast<uint32_t>(counted[j]) > clients;
      elements[j] = static_cast<Key>(static_cast<uint32_t>(counted[j])) << SCORE_BITS<Score>;
    }
    if constexpr (!std::is_same_v<Score, NoScore>) {
      Score among_equals[N];
      read(scores + index, valid, aligned, among_equals);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        wrong = wrong || is_nan(to_float(among_equals[j]));
        elements[j] |= key_of(among_equals[j]);
      }
    }
    if (wrong) {
      atomicOr(invalid, 1);
    }
  }

  template <int N>
  __device__ void keys(int64_t, int, const Key (&elements)[N], Key (&keys)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      keys[j] = elements[j];
    }
  }

  template <int N>
  __device__ void store(int64_t index, int valid, const Key (&elements)[N], uint32_t goes) const {
    bool kept[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // What nobody kept goes, wherever the cut is.
      kept[j] = !(goes >> j & 1) && elements[j] >> SCORE_BITS<Score> != 0;
    }
    write(mask + index, valid, aligned, kept);
  }
};

struct Request {
  const Tensor& votes;
  const Tensor* scores;
  const Tensor& mask;
  const Tensor& invalid;
  uint32_t clients;
  int64_t of;
  int64_t count;
  int64_t stream;
};

template <class Score, class Key>
void select(const Request& request) {
  const Score* scores = request.scores == nullptr ? nullptr : data<Score>(*request.scores);
  Votes<Score, Key> source{data<int>(request.votes),
                           scores,
                           mutable_data<bool>(request.mask),
                           mutable_data<int>(request.invalid),
                           request.clients,
                           std::max<int>(1, std::bit_width(request.clients) + SCORE_BITS<Score>),
                           false};
  source.aligned =
      is_aligned(source.votes, 16) && is_aligned(source.scores, 16) && is_aligned(source.mask, 16);
  const int64_t groups = request.votes.numel() / request.of;
  select_smallest(Device(request.votes, request.stream), request.votes, source, groups, request.of,
                  request.count);
}

std::tuple<Tensor, Tensor> expand_mask(const Tensor& votes, const std::optional<Tensor>& scores,
                                       int64_t clients, int64_t of, int64_t count, int64_t stream) {
  check_contiguous("expand_mask", votes, ScalarType::Int);
  const Tensor mask = new_empty_like(votes, ScalarType::Bool);
  const Tensor invalid = new_flag(votes);
  if (votes.numel() == 0) {
    return {mask, invalid};
  }
  STD_TORCH_CHECK(of > 0 && votes.numel() % of == 0 && 0 <= count && count <= of && clients >= 0,
                  "expand_mask: of, count or clients is out of range");
  // No vote can be larger than an int32.
  const auto most = static_cast<uint32_t>(std::min<int64_t>(clients, INT32_MAX));
  const Request request{votes, scores ? &*scores : nullptr, mask, invalid, most, of, count, stream};
  if (!scores) {
    select<NoScore, uint32_t>(request);
    return {mask, invalid};
  }
  STD_TORCH_CHECK(scores->is_contiguous() && scores->numel() == votes.numel(),
                  "expand_mask: needs contiguous scores, one for each vote");
  for_weight_dtype("expand_mask", *scores, [&]<class Score>() {
    if constexpr (SCORE_BITS<Score> < 32) {
      if (static_cast<int>(std::bit_width(most)) + SCORE_BITS<Score> <= 32) {
        return select<Score, uint32_t>(request);
      }
    }
    select<Score, uint64_t>(request);
  });
  return {mask, invalid};
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, FEDSPA_DEVICE, m) {
  m.impl("expand_mask", TORCH_BOX(&expand_mask));
}

} // namespace
} // namespace fedspa
