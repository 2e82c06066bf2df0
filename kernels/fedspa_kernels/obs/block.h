// One block of columns of a matrix as obs_prune_block_ gets it, and how tiles of its rows are
// loaded, marked and stored.

#pragma once

#include <select.h>

#include <algorithm>

#include "tile.h"

namespace fedspa {

// A matrix of a view whose rows are contiguous.
template <class T>
struct Rows {
  T* first;
  int64_t stride;

  FEDSPA_INLINE T* operator[](int64_t row) const { return first + row * stride; }
};

// The block of one matrix. Where no count is given, `selected` selects nothing.
template <class T>
struct Block {
  int64_t rows;
  Columns columns;
  bool given;
  Selected<int32_t> selected;
  const uint8_t* dead;
  float damp;
  Rows<const T> weight;
  const float* update;
  Rows<T> pruned;
  Rows<uint8_t> kept;
  Rows<float> change;
  float* loss;
  int32_t* invalid;
};

// By masking bits, since a branch would be mispredicted.
template <class T>
FEDSPA_INLINE float live_weight(T weight, uint8_t dead) {
  return float_of(float_bits(to_float(weight)) & (0u - (dead == 0)));
}

// start[0 .. size) = (dead ? 0 : weight) + update, from a column of a row on.
template <class T>
FEDSPA_INLINE void load_start(const Block<T>& block, int64_t row, int64_t col, int64_t size,
                              float* start) {
  const T* weight = block.weight[row] + col;
  const uint8_t* dead = block.dead + col;
  for (int64_t i = 0; i < size; ++i) {
    start[i] = live_weight(weight[i], dead[i]);
  }
  if (block.update != nullptr) {
    const float* update = block.update + row * block.columns.cols + col;
    for (int64_t i = 0; i < size; ++i) {
      start[i] += update[i];
    }
  }
}

// Marks what was selected of the tile of rows from `first` on.
template <class T>
FEDSPA_INLINE void mark_selected(const Block<T>& block, int64_t first, Tile& tile) {
  const int64_t cols = block.columns.cols;
  // The cut of each row: left of it the last selected key goes, right of it only what is smaller.
  const int32_t last = block.selected.last;
  int32_t cut[TILE_ROWS];
  for (int64_t row = 0; row < TILE_ROWS; ++row) {
    const int64_t left = block.selected.cut - (first + row) * cols;
    cut[row] = static_cast<int32_t>(std::clamp<int64_t>(left, 0, cols));
  }
  for (int64_t k = 0; k < cols; ++k) {
    const float* weights = tile.weights + k * TILE_ROWS;
    const float scale = block.columns.scale[k];
    const auto col = static_cast<int32_t>(k);
    // Flags as wide as keys: a store of bytes might change the keys, for all the compiler knows.
    int32_t stays[TILE_ROWS];
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      stays[row] = score_key(weights[row], scale) > last - (col >= cut[row]);
    }
    std::copy_n(stays, TILE_ROWS, tile.kept + k * TILE_ROWS);
    mark_column(tile, block.columns, k);
  }
}

template <class T>
FEDSPA_INLINE void mark_given(const Block<T>& block, int64_t first, int64_t rows, Tile& tile) {
  const int64_t cols = block.columns.cols;
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(block.kept[first + row], cols, tile.kept_rows + row * cols);
  }
  transpose_to_columns(tile.kept_rows, tile.kept, cols);
  for (int64_t k = 0; k < cols; ++k) {
    mark_column(tile, block.columns, k);
  }
}

template <class T>
FEDSPA_INLINE void load_tile(const Block<T>& block, int64_t first, int64_t rows, Tile& tile) {
  const int64_t cols = block.columns.cols;
  if (rows < TILE_ROWS) {
    tile = {};
  }
  float* starts = tile.errors;
  for (int64_t row = 0; row < rows; ++row) {
    const T* weight = block.weight[first + row];
    uint32_t not_finite = 0;
    for (int64_t k = 0; k < cols; ++k) {
      not_finite |= !is_finite(to_float(weight[k]));
    }
    if (not_finite != 0) {
      __atomic_store_n(block.invalid, 1, __ATOMIC_RELAXED);
    }
    load_start(block, first + row, 0, cols, starts + row * cols);
  }
  transpose_to_columns(starts, tile.weights, cols);
}

// The loss of weights that go because no input ever reached their column.
template <class T>
FEDSPA_INLINE float dead_loss(const Block<T>& block, int64_t row) {
  float sum = 0;
  for (int64_t k = 0; k < block.columns.cols; ++k) {
    const float weight = block.dead[k] != 0 ? to_float(block.weight[row][k]) : 0;
    sum += weight * weight;
  }
  return block.damp * sum;
}

template <class T>
FEDSPA_INLINE void store_tile(const Block<T>& block, int64_t first, int64_t rows, Tile& tile) {
  const int64_t cols = block.columns.cols;
  const bool any_dead =
      std::any_of(block.dead, block.dead + cols, [](uint8_t dead) { return dead != 0; });
  float* weights = tile.errors;
  transpose_to_rows(tile.weights, weights, cols);
  if (!block.given) {
    transpose_to_rows(tile.kept, tile.kept_rows, cols);
  }
  for (int64_t row = 0; row < rows; ++row, weights += cols) {
    const T* before = block.weight[first + row];
    T* pruned = block.pruned[first + row];
    float* change = block.change[first + row];
    for (int64_t k = 0; k < cols; ++k) {
      change[k] = live_weight(before[k], block.dead[k]) - weights[k];
      pruned[k] = from_float<T>(weights[k]);
    }
    if (!block.given) {
      std::copy_n(tile.kept_rows + row * cols, cols, block.kept[first + row]);
    }
    block.loss[first + row] += tile.loss[row];
    if (any_dead) {
      block.loss[first + row] += dead_loss(block, first + row);
    }
  }
}

} // namespace fedspa
