// Wanda on the GPU: |weight| times the norm of the input that it meets. How the smallest of each
// group are found stands in csrc/groups.cuh.

#include <torch/csrc/stable/library.h>
#include <groups.cuh>

#include <tuple>

namespace fedspa {
namespace {

__device__ bool is_refused(float norm) {
  return !(norm >= 0.0f && is_finite(norm));
}

// weight (rows, cols), norms (cols,) or (rows,) -> pruned (rows, cols), mask (rows, cols)
template <class T>
struct Weights {
  using Key = uint32_t;
  using Element = T;
  static constexpr int VECTOR = 16 / sizeof(T);
  // The keys of a row are held, since norms read anew for each digit would cost more than all else.
  // Rows too long for that hold their weights if these are halves; float32 rows beyond 53,000
  // columns (37,000 on sm_80) are read again for each digit, most of them from the L2 cache.
  static constexpr bool KEYS_ON_CHIP = true;
  static constexpr int bits = 31; // a product without its sign

  const T* weight;
  const float* norms;
  T* pruned;
  bool* mask;
  int* invalid;
  Divisor cols;
  bool norms_of_rows;
  bool aligned_norms;
  bool aligned;

  template <int N>
  __device__ void load(int64_t index, int valid, T (&elements)[N]) const {
    read(weight + index, valid, aligned, elements);
  }

  // The norms that N neighbours meet. A group may end in another row than it began.
  template <int N>
  __device__ void norms_at(int64_t index, int valid, float (&met)[N]) const {
    int64_t row = cols.quotient(index);
    int64_t col = index - row * cols.divisor();
    if (!norms_of_rows && aligned && aligned_norms && cols.divisor() % N == 0) {
      read(norms + col, N, true, met);
      return;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < valid) {
        met[j] = norms[norms_of_rows ? row : col];
        if (++col == cols.divisor()) {
          col = 0;
          ++row;
        }
      }
    }
  }

  template <int N>
  __device__ void keys(int64_t index, int valid, const T (&elements)[N], Key (&keys)[N]) const {
    float met[N] = {};
    norms_at(index, valid, met);
    bool wrong = false;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      keys[j] = __float_as_uint(__fmul_rn(to_float(elements[j]), met[j])) & 0x7fffffffu;
      wrong = wrong || is_refused(met[j]);
    }
    if (wrong) {
      atomicOr(invalid, 1);
    }
  }

  template <int N>
  __device__ void store(int64_t index, int valid, const T (&elements)[N], uint32_t goes) const {
    T left[N];
    bool kept[N], wrong = false;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      kept[j] = !(goes >> j & 1);
      left[j] = kept[j] ? elements[j] : from_float<T>(0.0f);
      wrong = wrong || !is_finite(to_float(elements[j]));
    }
    write(pruned + index, valid, aligned, left);
    write(mask + index, valid, aligned, kept);
    if (wrong) {
      atomicOr(invalid, 1);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(256)
    write_scores(const Weights<T> source, int64_t n, float* scores) {
  constexpr int VECTOR = Weights<T>::VECTOR;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t index = thread * VECTOR;
  if (index >= n) {
    return;
  }
  const int valid = n - index < VECTOR ? static_cast<int>(n - index) : VECTOR;
  T elements[VECTOR];
  uint32_t keys[VECTOR];
  float products[VECTOR];
  source.load(index, valid, elements);
  source.keys(index, valid, elements, keys);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    products[j] = __uint_as_float(keys[j]);
  }
  write(scores + index, valid, source.aligned, products);
}

// For a weight without entries, whose norms no other kernel reads.
__global__ void __launch_bounds__(256) check_norms(const float* norms, int64_t n, int* invalid) {
  const int64_t number = thread_number();
  if (number < n && is_refused(norms[number])) {
    atomicOr(invalid, 1);
  }
}

void launch_check(const char* name, const Tensor& norms, const Tensor& invalid, int64_t stream) {
  if (norms.numel() > 0) {
    launch(Device(norms, stream), &check_norms, blocks_for(name, norms.numel(), 256), 256, 0,
           data<float>(norms), norms.numel(), mutable_data<int>(invalid));
  }
}

// Where nothing is pruned, `pruned` and `mask` are null.
template <class T>
Weights<T> weights_of(const Tensor& weight, const Tensor& norms, bool norms_of_rows, T* pruned,
                      bool* mask, const Tensor& invalid) {
  const bool aligned =
      is_aligned(data<T>(weight), 16) && is_aligned(pruned, 16) && is_aligned(mask, 16);
  return {data<T>(weight),
          data<float>(norms),
          pruned,
          mask,
          mutable_data<int>(invalid),
          Divisor(weight.size(1)),
          norms_of_rows,
          is_aligned(data<float>(norms), 16),
          aligned};
}

void check_tensors(const char* name, const Tensor& weight, const Tensor& norms, int axis) {
  check_weight(name, weight);
  check_contiguous(name, norms, ScalarType::Float);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), name,
                  ": needs a contiguous weight (rows, cols)");
  check_sizes(name, norms, {weight.size(axis)});
}

std::tuple<Tensor, Tensor> wanda_scores(const Tensor& weight, const Tensor& norms, int64_t stream) {
  check_tensors("wanda_scores", weight, norms, 1);
  const Tensor scores = new_empty_like(weight, ScalarType::Float);
  const Tensor invalid = new_flag(weight);
  for_weight_dtype("wanda_scores", weight, [&]<class T>() {
    const int64_t n = weight.numel();
    if (n == 0) {
      return launch_check("wanda_scores", norms, invalid, stream);
    }
    auto source = weights_of<T>(weight, norms, false, nullptr, nullptr, invalid);
    source.aligned = source.aligned && n % source.VECTOR == 0;
    const int64_t entries = 256 * source.VECTOR;
    launch(Device(weight, stream), &write_scores<T>, blocks_for("wanda_scores", n, entries), 256, 0,
           source, n, mutable_data<float>(scores));
  });
  return {scores, invalid};
}

std::tuple<Tensor, Tensor, Tensor> wanda_prune(const Tensor& weight, const Tensor& norms,
                                               bool norms_of_rows, int64_t of, int64_t count,
                                               int64_t stream) {
  check_tensors("wanda_prune", weight, norms, norms_of_rows ? 0 : 1);
  const Tensor pruned = new_empty_like(weight, weight.scalar_type());
  const Tensor mask = new_empty_like(weight, ScalarType::Bool);
  const Tensor invalid = new_flag(weight);
  for_weight_dtype("wanda_prune", weight, [&]<class T>() {
    const int64_t n = weight.numel();
    if (n == 0) {
      return launch_check("wanda_prune", norms, invalid, stream);
    }
    STD_TORCH_CHECK(of > 0 && n % of == 0 && 0 <= count && count <= of,
                    "wanda_prune: of or count is out of range");
    const auto source = weights_of(weight, norms, norms_of_rows, mutable_data<T>(pruned),
                                   mutable_data<bool>(mask), invalid);
    select_smallest(Device(weight, stream), weight, source, n / of, of, count);
  });
  return {pruned, mask, invalid};
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, FEDSPA_DEVICE, m) {
  m.impl("wanda_scores", TORCH_BOX(&wanda_scores));
  m.impl("wanda_prune", TORCH_BOX(&wanda_prune));
}

} // namespace
} // namespace fedspa
