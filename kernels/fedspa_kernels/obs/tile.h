// SparseGPT's sweep over one block of columns, for a tile of rows that stays in the first cache.
//
// The tile is held transposed, so that a vector holds one column of many rows and no row waits for
// another. The sweep is left-looking in steps of a few columns: these first take the errors of all
// columns before them, as a small matrix product whose sums stay in registers, and only among
// themselves go column by column.

#pragma once

#include <cpu.h>

#include <algorithm>
#include <cstring>

namespace fedspa {

constexpr int64_t WIDEST = 128;
constexpr int64_t TILE_ROWS = 32;
constexpr int64_t STEP = 8;

struct alignas(64) Tile {
  // In: the start values; out: the pruned ones.
  float weights[WIDEST][TILE_ROWS];
  // In: the column's scale where the weight goes, else 0; out: the error, w_k * scale_k or 0.
  float errors[WIDEST][TILE_ROWS];
  bool goes[WIDEST][TILE_ROWS];
  // Sums of the squared errors.
  float loss[TILE_ROWS];
};

// What a sweep reads: scale (cols,), inverse (cols, cols), and "keep of every of", or of == 0 where
// what goes is known before.
struct Columns {
  int64_t cols;
  const float* scale;
  const float* inverse;
  int64_t keep;
  int64_t of;
};

// |w| * L_kk in the order of integers.
FEDSPA_INLINE int32_t score_key(float weight, float scale) {
  return static_cast<int32_t>(float_bits(weight * scale) & 0x7fffffff);
}

// w_j -= e_k * R_kj for `COLS` columns from j on, begin <= k < end. `WIDTH` is that of the
// machine's vectors; two of them share each entry of the inverse.
template <int WIDTH, int COLS>
FEDSPA_INLINE void subtract_errors(Tile& tile, const Columns& columns, int64_t begin, int64_t end,
                                   int64_t j) {
  typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));
  for (int64_t row = 0; row < TILE_ROWS; row += 2 * WIDTH) {
    Vector weights[COLS][2];
    for (int64_t col = 0; col < COLS; ++col) {
      std::memcpy(weights[col], &tile.weights[j + col][row], sizeof(weights[col]));
    }
    for (int64_t k = begin; k < end; ++k) {
      const float* inverse = columns.inverse + k * columns.cols + j;
      Vector errors[2];
      std::memcpy(errors, &tile.errors[k][row], sizeof(errors));
#pragma GCC unroll 8
      for (int64_t col = 0; col < COLS; ++col) {
        weights[col][0] -= errors[0] * inverse[col];
        weights[col][1] -= errors[1] * inverse[col];
      }
    }
    for (int64_t col = 0; col < COLS; ++col) {
      std::memcpy(&tile.weights[j + col][row], weights[col], sizeof(weights[col]));
    }
  }
}

// The same for the columns j up to `stop`.
template <int WIDTH>
FEDSPA_INLINE void subtract_all_errors(Tile& tile, const Columns& columns, int64_t begin,
                                       int64_t end, int64_t j, int64_t stop) {
  constexpr int64_t TOGETHER = WIDTH == 16 ? 8 : 4; // as many sums as there are registers for
  for (; j + TOGETHER <= stop; j += TOGETHER) {
    subtract_errors<WIDTH, TOGETHER>(tile, columns, begin, end, j);
  }
  for (; j < stop; ++j) {
    subtract_errors<WIDTH, 1>(tile, columns, begin, end, j);
  }
}

// Of a group of neighbours all but `keep` go: those with fewer than of - keep smaller ones, where
// the lower column is the smaller among equals.
FEDSPA_INLINE void choose_in_group(Tile& tile, const Columns& columns, int64_t first) {
  int32_t keys[WIDEST][TILE_ROWS];
  for (int64_t a = 0; a < columns.of; ++a) {
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      keys[a][row] = score_key(tile.weights[first + a][row], columns.scale[first + a]);
    }
  }
  const auto count = static_cast<int32_t>(columns.of - columns.keep);
  for (int64_t a = 0; a < columns.of; ++a) {
    int32_t smaller[TILE_ROWS] = {};
    for (int64_t b = 0; b < columns.of; ++b) {
      const int32_t equal_counts = b < a;
      for (int64_t row = 0; row < TILE_ROWS; ++row) {
        smaller[row] += keys[b][row] - equal_counts < keys[a][row];
      }
    }
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      const bool goes = smaller[row] < count;
      tile.goes[first + a][row] = goes;
      tile.errors[first + a][row] = goes ? columns.scale[first + a] : 0;
    }
  }
}

// SparseGPT's loop over a few columns, up to date with all the errors before them.
FEDSPA_INLINE void sweep_step(Tile& tile, const Columns& columns, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    if (columns.of != 0 && k % columns.of == 0) {
      choose_in_group(tile, columns, k);
    }
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      const float scale = tile.errors[k][row];
      const float weight = tile.weights[k][row];
      const float error = weight * scale;
      tile.errors[k][row] = error;
      tile.weights[k][row] = scale != 0 ? 0 : weight;
      tile.loss[row] += error * error;
    }
    const float* inverse = columns.inverse + k * columns.cols;
    for (int64_t j = k + 1; j < end; ++j) {
      for (int64_t row = 0; row < TILE_ROWS; ++row) {
        tile.weights[j][row] -= tile.errors[k][row] * inverse[j];
      }
    }
  }
}

// Sweeps over all columns. A group of neighbours is chosen when its first column is reached, so
// that all of its columns have to be up to date with what is before the group.
template <int WIDTH>
FEDSPA_INLINE void sweep(Tile& tile, const Columns& columns) {
  const int64_t of = columns.of;
  const int64_t stride = of == 0 ? STEP : of <= STEP ? STEP / of * of : of;
  std::fill_n(tile.loss, TILE_ROWS, 0.0f);
  for (int64_t group = 0; group < columns.cols; group += stride) {
    const int64_t stop = std::min(group + stride, columns.cols);
    subtract_all_errors<WIDTH>(tile, columns, 0, group, group, stop);
    for (int64_t begin = group; begin < stop; begin += STEP) {
      const int64_t end = std::min(begin + STEP, stop);
      subtract_all_errors<WIDTH>(tile, columns, group, begin, begin, end);
      sweep_step(tile, columns, begin, end);
    }
  }
}

} // namespace fedspa
