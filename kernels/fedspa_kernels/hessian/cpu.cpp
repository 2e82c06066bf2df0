// mirror_upper_ on the CPU: what is below the diagonal becomes the transpose of what is above it.
//
// hessian (N, K, K) float32, contiguous. Tiles are read row by row into a buffer: the rows of a
// tile often lie a power of two apart, where a cache keeps only a few of them.

#include <cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace {

using namespace fedspa;

constexpr int64_t TILE = 64;

// The tile of rows from `row` and columns from `col` <= row, below the diagonal, from its mirror.
FEDSPA_INLINE void mirror_tile(float* hessian, int64_t k, int64_t row, int64_t col) {
  float tile[TILE][TILE];
  const int64_t rows = std::min(TILE, k - row);
  const int64_t cols = std::min(TILE, k - col);
  for (int64_t c = 0; c < cols; ++c) {
    std::copy_n(hessian + (col + c) * k + row, rows, tile[c]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t below = std::min(cols, row + r - col);
    for (int64_t c = 0; c < below; ++c) {
      hessian[(row + r) * k + col + c] = tile[c][r];
    }
  }
}

void mirror_upper_(Tensor hessian, int64_t) {
  check_contiguous("mirror_upper_", hessian, ScalarType::Float);
  STD_TORCH_CHECK(hessian.dim() == 3 && hessian.size(1) == hessian.size(2),
                  "mirror_upper_: needs a hessian (N, K, K)");
  const int64_t k = hessian.size(1);
  const int64_t tiles = (k + TILE - 1) / TILE;
  // The first row of tiles and the last make one task, the second and the last but one, and so on:
  // each the same number of tiles.
  const int64_t pairs = (tiles + 1) / 2;
  auto* out = mutable_data<float>(hessian);
  for_ranges(hessian.size(0) * pairs, 1, [=](int64_t begin, int64_t end) FEDSPA_BODY {
    for (int64_t task = begin; task < end; ++task) {
      float* matrix = out + task / pairs * k * k;
      const int64_t first = task % pairs;
      const int64_t last = tiles - 1 - first;
      for (int64_t tile = 0; tile <= first; ++tile) {
        mirror_tile(matrix, k, first * TILE, tile * TILE);
      }
      for (int64_t tile = 0; tile <= last && last != first; ++tile) {
        mirror_tile(matrix, k, last * TILE, tile * TILE);
      }
    }
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("mirror_upper_", TORCH_BOX(&mirror_upper_));
}
