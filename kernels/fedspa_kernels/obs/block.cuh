// The tensors of obs_prune_block_ on the GPU, and what its weights start from.

#pragma once

#include <neighbours.cuh>
#include <radix.cuh>

namespace fedspa::obs {

// A view (matrices, rows, cols) whose columns are neighbours.
template <class T>
struct View {
  T* first;
  int64_t matrix;
  int64_t row;
  bool aligned; // every fourth column is where four can be moved as one

  __device__ T* at(int64_t nth, int64_t row_of_it, int col) const {
    return first + nth * matrix + row_of_it * row + col;
  }
};

template <class T>
struct Block {
  View<const T> weight;
  View<const float> update; // `first` is null: zeros
  const float* scale; // (matrices, cols)
  const bool* dead; // (matrices, cols)
  const float* damp; // (matrices,)
  const float* inverse; // (matrices, cols, cols), upper triangular
  View<T> pruned;
  View<bool> kept;
  View<float> change;
  float* loss; // (matrices, rows)
  int* invalid;
  int64_t rows;
  int cols;
  int keep;
  int of; // 0: `kept` says what goes
  bool aligned_inverse;

  // What N neighbours start from: the weight, or 0 in a dead column, and the update.
  template <int N>
  __device__ void start(int64_t nth, int64_t row, int col, int valid, bool aligned, T (&raw)[N],
                        float (&alive)[N], float (&started)[N]) const {
    float added[N] = {};
    read(weight.at(nth, row, col), valid, aligned && weight.aligned, raw);
    if (update.first != nullptr) {
      read(update.at(nth, row, col), valid, aligned && update.aligned, added);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      alive[j] = j < valid && !dead[nth * cols + col + j] ? to_float(raw[j]) : 0.0f;
      started[j] = __fadd_rn(alive[j], added[j]);
    }
  }
};

template <class T>
View<T> view_of(T* first, const Tensor& tensor) {
  const auto strides = tensor.strides();
  const bool aligned =
      is_aligned(first, 4 * sizeof(T)) && strides[0] % 4 == 0 && strides[1] % 4 == 0;
  return {first, strides[0], strides[1], aligned};
}
} // namespace fedspa::obs
