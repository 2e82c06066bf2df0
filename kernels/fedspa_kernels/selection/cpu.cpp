// smallest_mask on the CPU; kernel.py says what it computes. The selection is csrc/groups.h.

#include <cpu.h>
#include <groups.h>
#include <order.h>
#include <pages.h>
#include <scores.h>
#include <tensors.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>

namespace {

using namespace fedspa;

template <class T>
struct Scores {
  const T* scores;
  bool* mask;

  FEDSPA_BODY bool load(int64_t begin, int64_t size, int32_t* keys) const {
    const T* in = scores + begin;
    int32_t wrong = 0;
    for (int64_t i = 0; i < size; ++i) {
      keys[i] = order_key(order_bits(in[i]));
      wrong |= is_nan<T>(keys[i]);
    }
    return wrong != 0;
  }

  FEDSPA_BODY void store(int64_t begin, int64_t size, const int32_t* keys, int32_t last) const {
    bool* out = mask + begin;
    for (int64_t i = 0; i < size; ++i) {
      out[i] = keys[i] <= last;
    }
  }
};

std::tuple<Tensor, Tensor> smallest_mask(const Tensor& scores, int64_t k, int64_t /*stream*/) {
  check_contiguous("smallest_mask: scores", scores, scores.scalar_type());
  STD_TORCH_CHECK(scores.dim() == 2 && k >= 0 && k <= scores.size(1),
                  "smallest_mask: needs (groups, n) scores and 0 <= k <= n");
  Tensor mask = new_output(scores, ScalarType::Bool);
  Tensor invalid = new_flag(scores);
  for_weight_dtype("smallest_mask: scores", scores, [&]<class T>() {
    const Scores<T> entries{data<T>(scores), mutable_data<bool>(mask)};
    *mutable_data<int32_t>(invalid) =
        select_in_groups<int32_t>(scores.numel(), scores.size(1), k, entries);
  });
  return {mask, invalid};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("smallest_mask", TORCH_BOX(&smallest_mask));
}
