// What a sweep keeps in shared memory, and how the threads of a block share its rows.

#pragma once

#include <neighbours.cuh>

#include "block.cuh"

namespace fedspa::obs {

constexpr int MOST_COLS = 128;
constexpr int LANES = 4; // of a row; each has 4 neighbouring columns of every panel of 16
constexpr int PANEL = 4 * LANES;
constexpr int PANELS = MOST_COLS / PANEL;
constexpr int MOST_THREADS = 256;

// The shared memory of a sweep. Rows of the inverse and scales are padded with zeros.
struct OnChip {
  __device__ OnChip(int cols, int of)
      : inverse(shared_memory<float>()),
        scale(inverse + cols * MOST_COLS),
        going(reinterpret_cast<uint32_t*>(scale + MOST_COLS)),
        scores(going + blockDim.x),
        stride(of | 1) {}

  // of > 0: with a pattern
  static constexpr size_t bytes(int cols, int of, int threads) {
    const int pattern = of == 0 ? 0 : threads + threads / LANES * (of | 1);
    return sizeof(float) * (cols * MOST_COLS + MOST_COLS + pattern);
  }

  float* inverse; // (cols, MOST_COLS)
  float* scale; // (MOST_COLS,)
  uint32_t* going; // (rows of the thread block, MOST_COLS / 32), bits: what a pattern lets go
  uint32_t* scores; // (rows of the thread block, stride), of the columns that compete
  int stride; // odd: rows begin in different banks
};
static_assert(OnChip::bytes(MOST_COLS, MOST_COLS, MOST_THREADS) <= SMALLEST_SHARED_LIMIT);

// Fills the inverse and the scales, the latter being the only ones that start with a wrong value.
template <class T>
__device__ void load_on_chip(const Block<T>& block, int64_t nth, const OnChip& on_chip) {
  const int cols = block.cols;
  const float* inverse = block.inverse + nth * cols * cols;
#pragma unroll 4
  for (int i = threadIdx.x; i < cols * (MOST_COLS / 4); i += blockDim.x) {
    const int k = i / (MOST_COLS / 4), col = i % (MOST_COLS / 4) * 4;
    // Below the diagonal there is nothing to read.
    const int valid = col + 3 < k || col >= cols ? 0 : cols - col < 4 ? cols - col : 4;
    float four[4];
    read(inverse + k * cols + col, valid, valid == 4 && block.aligned_inverse, four);
    write(on_chip.inverse + 4 * i, 4, true, four);
  }
  for (int col = threadIdx.x; col < MOST_COLS; col += blockDim.x) {
    on_chip.scale[col] = col < cols ? block.scale[nth * cols + col] : 0.0f;
  }
}

} // namespace fedspa::obs
