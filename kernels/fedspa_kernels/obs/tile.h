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

typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector16 __attribute__((vector_size(64)));

// Arrays are (cols, TILE_ROWS) without gaps; while a tile is loaded and stored, (TILE_ROWS, cols).
struct alignas(64) Tile {
  // In: the start values; out: the pruned ones.
  float weights[WIDEST * TILE_ROWS];
  // In: the column's scale where the weight goes, else 0; out: the error, w_k * scale_k or 0.
  float errors[WIDEST * TILE_ROWS];
  uint8_t kept[WIDEST * TILE_ROWS];
  uint8_t kept_rows[WIDEST * TILE_ROWS];
  // Sums of the squared errors.
  float loss[TILE_ROWS];
};

static_assert(TILE_ROWS == 1 << 5, "a transpose is so many shuffles");

// A perfect shuffle of a matrix, its first half with its second, moves the highest bit of the row
// to the end of the index. Five of them transpose it, and they vectorise on every machine.
// `rows` is overwritten.
template <class T>
FEDSPA_INLINE void transpose_to_columns(T* rows, T* columns, int64_t cols) {
  const int64_t half = TILE_ROWS / 2 * cols;
  for (int shuffle = 0; shuffle < 5; ++shuffle) {
    const T* __restrict__ from = shuffle % 2 == 0 ? rows : columns;
    T* __restrict__ to = shuffle % 2 == 0 ? columns : rows;
    for (int64_t i = 0; i < half; ++i) {
      to[2 * i] = from[i];
      to[2 * i + 1] = from[half + i];
    }
  }
}

// The inverse; `columns` is overwritten.
template <class T>
FEDSPA_INLINE void transpose_to_rows(T* columns, T* rows, int64_t cols) {
  const int64_t half = TILE_ROWS / 2 * cols;
  for (int shuffle = 0; shuffle < 5; ++shuffle) {
    const T* __restrict__ from = shuffle % 2 == 0 ? columns : rows;
    T* __restrict__ to = shuffle % 2 == 0 ? rows : columns;
    for (int64_t i = 0; i < half; ++i) {
      to[i] = from[2 * i];
      to[half + i] = from[2 * i + 1];
    }
  }
}

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

// One vector at a time: a copy of both would keep them, and all sums beside them, in memory.
template <class Vector>
FEDSPA_INLINE void load(Vector (&vectors)[2], const float* from) {
  std::memcpy(&vectors[0], from, sizeof(Vector));
  std::memcpy(&vectors[1], from + sizeof(Vector) / sizeof(float), sizeof(Vector));
}

// w_j -= e_k * R_kj for `COLS` columns from j on, begin <= k < end. Two vectors of rows
// share each entry of the inverse.
template <class Vector, int COLS>
FEDSPA_INLINE void subtract_errors(Tile& tile, const Columns& columns, int64_t begin, int64_t end,
                                   int64_t j) {
  constexpr int64_t WIDTH = sizeof(Vector) / sizeof(float);
  for (int64_t row = 0; row < TILE_ROWS; row += 2 * WIDTH) {
    Vector weights[COLS][2];
#pragma GCC unroll 8
    for (int64_t col = 0; col < COLS; ++col) {
      load(weights[col], tile.weights + (j + col) * TILE_ROWS + row);
    }
    for (int64_t k = begin; k < end; ++k) {
      Vector errors[2];
      load(errors, tile.errors + k * TILE_ROWS + row);
      const float* inverse = columns.inverse + k * columns.cols + j;
#pragma GCC unroll 8
      for (int64_t col = 0; col < COLS; ++col) {
        weights[col][0] -= errors[0] * inverse[col];
        weights[col][1] -= errors[1] * inverse[col];
      }
    }
#pragma GCC unroll 8
    for (int64_t col = 0; col < COLS; ++col) {
      float* to = tile.weights + (j + col) * TILE_ROWS + row;
      std::memcpy(to, &weights[col][0], sizeof(Vector));
      std::memcpy(to + WIDTH, &weights[col][1], sizeof(Vector));
    }
  }
}

// The same for the columns j up to `stop`.
template <class Vector>
FEDSPA_INLINE void subtract_all_errors(Tile& tile, const Columns& columns, int64_t begin,
                                       int64_t end, int64_t j, int64_t stop) {
  // As many sums as there are registers for.
  constexpr int64_t TOGETHER = sizeof(Vector) == sizeof(Vector16) ? 8 : 4;
  for (; j + TOGETHER <= stop; j += TOGETHER) {
    subtract_errors<Vector, TOGETHER>(tile, columns, begin, end, j);
  }
  for (; j < stop; ++j) {
    subtract_errors<Vector, 1>(tile, columns, begin, end, j);
  }
}

// What is not kept of column k goes.
FEDSPA_INLINE void mark_column(Tile& tile, const Columns& columns, int64_t k) {
  const uint32_t scale = float_bits(columns.scale[k]);
  for (int64_t i = k * TILE_ROWS; i < (k + 1) * TILE_ROWS; ++i) {
    tile.errors[i] = float_of(tile.kept[i] != 0 ? 0 : scale);
  }
}

// Of a group of neighbours all but `keep` go: those with fewer than of - keep smaller ones, where
// the lower column is the smaller among equals.
FEDSPA_INLINE void choose_in_group(Tile& tile, const Columns& columns, int64_t first) {
  int32_t keys[WIDEST][TILE_ROWS];
  for (int64_t a = 0; a < columns.of; ++a) {
    const float* weights = tile.weights + (first + a) * TILE_ROWS;
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      keys[a][row] = score_key(weights[row], columns.scale[first + a]);
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
    uint8_t* kept = tile.kept + (first + a) * TILE_ROWS;
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      kept[row] = smaller[row] >= count;
    }
    mark_column(tile, columns, first + a);
  }
}

// SparseGPT's loop over a few columns, up to date with all the errors before them.
FEDSPA_INLINE void sweep_step(Tile& tile, const Columns& columns, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    if (columns.of != 0 && k % columns.of == 0) {
      choose_in_group(tile, columns, k);
    }
    float* errors = tile.errors + k * TILE_ROWS;
    float* weights = tile.weights + k * TILE_ROWS;
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      const float scale = errors[row];
      const float weight = weights[row];
      errors[row] = weight * scale;
      weights[row] = scale != 0 ? 0 : weight;
      tile.loss[row] += errors[row] * errors[row];
    }
    const float* inverse = columns.inverse + k * columns.cols;
    for (int64_t j = k + 1; j < end; ++j) {
      float* after = tile.weights + j * TILE_ROWS;
      for (int64_t row = 0; row < TILE_ROWS; ++row) {
        after[row] -= errors[row] * inverse[j];
      }
    }
  }
}

// Sweeps over all columns. A group of neighbours is chosen when its first column is reached, so
// that all of its columns have to be up to date with what is before the group.
template <class Vector>
FEDSPA_INLINE void sweep(Tile& tile, const Columns& columns) {
  const int64_t of = columns.of;
  const int64_t stride = of == 0 ? STEP : of <= STEP ? STEP / of * of : of;
  std::fill_n(tile.loss, TILE_ROWS, 0.0f);
  for (int64_t group = 0; group < columns.cols; group += stride) {
    const int64_t stop = std::min(group + stride, columns.cols);
    subtract_all_errors<Vector>(tile, columns, 0, group, group, stop);
    for (int64_t begin = group; begin < stop; begin += STEP) {
      const int64_t end = std::min(begin + STEP, stop);
      subtract_all_errors<Vector>(tile, columns, group, begin, begin, end);
      sweep_step(tile, columns, begin, end);
    }
  }
}

} // namespace fedspa
