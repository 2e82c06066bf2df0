// obs_prune_block_ on the CPU: SparseGPT's update of one block of columns.
//
// What goes of the whole block is selected first, where a count is given. Then tiles of rows are
// independent: loaded and transposed, swept over (tile.h), and stored.

#include <select.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "tile.h"

namespace {

using namespace fedspa;

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
  const bool* dead;
  float damp;
  Rows<const T> weight;
  const float* update;
  Rows<T> pruned;
  Rows<bool> kept;
  Rows<float> change;
  float* loss;
  int32_t* invalid;
};

// start[0 .. size) = (dead ? 0 : weight) + update, from a column of a row on.
template <class T>
FEDSPA_INLINE void load_start(const Block<T>& block, int64_t row, int64_t col, int64_t size,
                              float* start) {
  const T* weight = block.weight[row] + col;
  const bool* dead = block.dead + col;
  for (int64_t i = 0; i < size; ++i) {
    start[i] = float_of(float_bits(to_float(weight[i])) & (static_cast<uint32_t>(dead[i]) - 1));
  }
  if (block.update != nullptr) {
    const float* update = block.update + row * block.columns.cols + col;
    for (int64_t i = 0; i < size; ++i) {
      start[i] += update[i];
    }
  }
}

// The `count` smallest scores of the block's start values; they are computed here and once more in
// the tiles, which costs less than keeping them.
template <class T>
Selected<int32_t> select_in_block(const Block<T>& block, int64_t count) {
  const int64_t cols = block.columns.cols;
  const auto load = [=](int64_t begin, int64_t size, int32_t* keys) FEDSPA_BODY {
    float start[WIDEST];
    int64_t col = begin % cols;
    for (int64_t row = begin / cols, done = 0; done < size; ++row, col = 0) {
      const int64_t run = std::min(cols - col, size - done);
      load_start(block, row, col, run, start);
      for (int64_t i = 0; i < run; ++i) {
        keys[done + i] = score_key(start[i], block.columns.scale[col + i]);
      }
      done += run;
    }
  };
  return select_smallest<int32_t>(block.rows * cols, count, load);
}

// Marks what was selected of the tile of rows from `first` on.
template <class T>
FEDSPA_INLINE void mark_selected(const Block<T>& block, int64_t first, Tile& tile) {
  const int64_t cols = block.columns.cols;
  // The cut of each row: left of it the last selected key goes, right of it only what is smaller.
  int32_t cut[TILE_ROWS];
  for (int64_t row = 0; row < TILE_ROWS; ++row) {
    const int64_t left = block.selected.cut - (first + row) * cols;
    cut[row] = static_cast<int32_t>(std::clamp<int64_t>(left, 0, cols));
  }
  for (int64_t k = 0; k < cols; ++k) {
    const float scale = block.columns.scale[k];
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      const int32_t last = block.selected.last - (static_cast<int32_t>(k) >= cut[row]);
      const bool goes = score_key(tile.weights[k][row], scale) <= last;
      tile.goes[k][row] = goes;
      tile.errors[k][row] = goes ? scale : 0;
    }
  }
}

template <class T>
FEDSPA_INLINE void mark_given(const Block<T>& block, int64_t first, int64_t rows, Tile& tile) {
  for (int64_t row = 0; row < rows; ++row) {
    const bool* kept = block.kept[first + row];
    for (int64_t k = 0; k < block.columns.cols; ++k) {
      tile.errors[k][row] = kept[k] ? 0 : block.columns.scale[k];
    }
  }
}

template <class T>
FEDSPA_INLINE void load_tile(const Block<T>& block, int64_t first, int64_t rows, Tile& tile) {
  const int64_t cols = block.columns.cols;
  if (rows < TILE_ROWS) {
    tile = {};
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T* weight = block.weight[first + row];
    uint32_t not_finite = 0;
    for (int64_t k = 0; k < cols; ++k) {
      not_finite |= !is_finite(to_float(weight[k]));
    }
    if (not_finite != 0) {
      __atomic_store_n(block.invalid, 1, __ATOMIC_RELAXED);
    }
    float start[WIDEST];
    load_start(block, first + row, 0, cols, start);
    for (int64_t k = 0; k < cols; ++k) {
      tile.weights[k][row] = start[k];
    }
  }
}

// The loss of weights that go because no input ever reached their column.
template <class T>
FEDSPA_INLINE float dead_loss(const Block<T>& block, int64_t row) {
  float sum = 0;
  for (int64_t k = 0; k < block.columns.cols; ++k) {
    const float weight = block.dead[k] ? to_float(block.weight[row][k]) : 0;
    sum += weight * weight;
  }
  return block.damp * sum;
}

template <class T>
FEDSPA_INLINE void store_tile(const Block<T>& block, int64_t first, int64_t rows,
                              const Tile& tile) {
  const int64_t cols = block.columns.cols;
  const bool any_dead = std::any_of(block.dead, block.dead + cols, [](bool dead) { return dead; });
  for (int64_t row = 0; row < rows; ++row) {
    float weights[WIDEST];
    for (int64_t k = 0; k < cols; ++k) {
      weights[k] = tile.weights[k][row];
    }
    const T* before = block.weight[first + row];
    T* pruned = block.pruned[first + row];
    float* change = block.change[first + row];
    for (int64_t k = 0; k < cols; ++k) {
      const float live = block.dead[k] ? 0 : to_float(before[k]);
      change[k] = live - weights[k];
      pruned[k] = from_float<T>(weights[k]);
    }
    if (!block.given) {
      bool* kept = block.kept[first + row];
      for (int64_t k = 0; k < cols; ++k) {
        kept[k] = !tile.goes[k][row];
      }
    }
    block.loss[first + row] += tile.loss[row];
    if (any_dead) {
      block.loss[first + row] += dead_loss(block, first + row);
    }
  }
}

template <int WIDTH, class T>
FEDSPA_INLINE void prune_tile(const Block<T>& block, int64_t first) {
  Tile tile;
  const int64_t rows = std::min(TILE_ROWS, block.rows - first);
  load_tile(block, first, rows, tile);
  if (block.given) {
    mark_given(block, first, rows, tile);
  } else if (block.columns.of == 0) {
    mark_selected(block, first, tile);
  }
  sweep<WIDTH>(tile, block.columns);
  store_tile(block, first, rows, tile);
}

template <int WIDTH, class T>
void prune_tiles(const std::vector<Block<T>>& blocks, int64_t rows) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for_ranges(std::ssize(blocks) * tiles, 1,
             [tiles, blocks = blocks.data()](int64_t begin, int64_t end) FEDSPA_BODY {
               for (int64_t tile = begin; tile < end; ++tile) {
                 prune_tile<WIDTH>(blocks[tile / tiles], tile % tiles * TILE_ROWS);
               }
             });
}

template <class T>
Rows<T> rows_of(const Tensor& tensor, int64_t matrix) {
  T* first = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  return {first + matrix * tensor.stride(0), tensor.stride(1)};
}

void check_view(const Tensor& view, const Tensor& weight, ScalarType dtype) {
  check_dtype("obs_prune_block_", view, dtype);
  check_sizes("obs_prune_block_", view, {weight.size(0), weight.size(1), weight.size(2)});
  STD_TORCH_CHECK(view.stride(2) == 1 || view.size(2) == 1,
                  "obs_prune_block_: needs contiguous rows");
}

void check_array(const Tensor& array, std::initializer_list<int64_t> sizes,
                 ScalarType dtype = ScalarType::Float) {
  check_contiguous("obs_prune_block_", array, dtype);
  check_sizes("obs_prune_block_", array, sizes);
}

void obs_prune_block_(const Tensor& weight, std::optional<Tensor> update, const Tensor& scale,
                      const Tensor& dead, const Tensor& damp, const Tensor& inverse, int64_t count,
                      int64_t keep, int64_t of, Tensor pruned, Tensor kept, Tensor change,
                      Tensor loss, Tensor invalid, int64_t) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(2) <= WIDEST,
                  "obs_prune_block_: needs a weight of three dimensions and at most ", WIDEST,
                  " columns");
  const int64_t matrices = weight.size(0);
  const int64_t rows = weight.size(1);
  const int64_t cols = weight.size(2);
  STD_TORCH_CHECK(count <= rows * cols && of >= 0 && (of == 0 || (count < 0 && cols % of == 0)),
                  "obs_prune_block_: needs count <= rows * cols, or groups that divide cols");
  check_view(weight, weight, weight.scalar_type());
  check_view(pruned, weight, weight.scalar_type());
  check_view(kept, weight, ScalarType::Bool);
  check_view(change, weight, ScalarType::Float);
  if (update) {
    check_array(*update, {matrices, rows, cols});
  }
  check_array(scale, {matrices, cols});
  check_array(dead, {matrices, cols}, ScalarType::Bool);
  check_array(damp, {matrices});
  check_array(inverse, {matrices, cols, cols});
  check_array(loss, {matrices, rows});
  check_array(invalid, {1}, ScalarType::Int);
  if (weight.numel() == 0) {
    return;
  }
  for_weight_dtype("obs_prune_block_", weight, [&]<class T>() {
    std::vector<Block<T>> blocks;
    for (int64_t n = 0; n < matrices; ++n) {
      blocks.push_back(
          {rows,
           {cols, data<float>(scale) + n * cols, data<float>(inverse) + n * cols * cols, keep, of},
           count < 0 && of == 0,
           {},
           data<bool>(dead) + n * cols,
           data<float>(damp)[n],
           rows_of<const T>(weight, n),
           update ? data<float>(*update) + n * rows * cols : nullptr,
           rows_of<T>(pruned, n),
           rows_of<bool>(kept, n),
           rows_of<float>(change, n),
           mutable_data<float>(loss) + n * rows,
           mutable_data<int32_t>(invalid)});
      if (count >= 0) {
        blocks.back().selected = select_in_block(blocks.back(), count);
      }
    }
    if (instruction_set() == InstructionSet::AVX512) {
      prune_tiles<16>(blocks, rows);
    } else {
      prune_tiles<8>(blocks, rows);
    }
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("obs_prune_block_", TORCH_BOX(&obs_prune_block_));
}
