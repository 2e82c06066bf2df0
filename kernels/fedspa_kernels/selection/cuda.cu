// The k smallest of each row on the GPU; how they are found stands in csrc/groups.cuh.

#include <torch/csrc/stable/library.h>
#include <groups.cuh>

#include <tuple>

namespace fedspa {
namespace {

// scores (groups, n) -> mask (groups, n), True where a score is among the smallest
template <class T>
struct Scores {
  using Key = uint32_t;
  using Element = T;
  static constexpr int VECTOR = 16 / sizeof(T);
  static constexpr bool KEYS_ON_CHIP = false;
  static constexpr int bits = KEY_BITS<T>;

  const T* scores;
  bool* mask;
  int* invalid;
  bool aligned;

  template <int N>
  __device__ void load(int64_t index, int valid, T (&elements)[N]) const {
    read(scores + index, valid, aligned, elements);
  }

  template <int N>
  __device__ void keys(int64_t, int, const T (&elements)[N], Key (&keys)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      keys[j] = key_of(elements[j]);
    }
  }

  template <int N>
  __device__ void store(int64_t index, int valid, const T (&elements)[N], uint32_t goes) const {
    bool smallest[N], nan = false;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      smallest[j] = goes >> j & 1;
      nan = nan || is_nan(to_float(elements[j]));
    }
    write(mask + index, valid, aligned, smallest);
    if (nan) {
      atomicOr(invalid, 1);
    }
  }
};

std::tuple<Tensor, Tensor> smallest_mask(const Tensor& scores, int64_t k, int64_t stream) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.is_contiguous(),
                  "smallest_mask: needs contiguous scores (groups, n)");
  STD_TORCH_CHECK(0 <= k && k <= scores.size(1), "smallest_mask: k is out of range");
  const Tensor mask = new_empty_like(scores, ScalarType::Bool);
  const Tensor invalid = new_flag(scores);
  for_weight_dtype("smallest_mask", scores, [&]<class T>() {
    if (scores.numel() == 0) {
      return;
    }
    const bool aligned = is_aligned(data<T>(scores), 16) && is_aligned(data<bool>(mask), 16);
    const Scores<T> source{data<T>(scores), mutable_data<bool>(mask), mutable_data<int>(invalid),
                           aligned};
    select_smallest(Device(scores, stream), scores, source, scores.size(0), scores.size(1), k);
  });
  return {mask, invalid};
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, FEDSPA_DEVICE, m) {
  m.impl("smallest_mask", TORCH_BOX(&smallest_mask));
}

} // namespace
} // namespace fedspa
