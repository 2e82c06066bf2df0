// obs_prune_block_ on the CPU: SparseGPT's update of one block of columns.
//
// What goes of the whole block is selected first, where a count is given. Then tiles of rows are
// independent: loaded and transposed (block.h), swept over (tile.h), and stored.

#include <select.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "block.h"

namespace {

using namespace fedspa;

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

template <class Vector, class T>
FEDSPA_INLINE void prune_tile(const Block<T>& block, int64_t first) {
  Tile tile;
  const int64_t rows = std::min(TILE_ROWS, block.rows - first);
  load_tile(block, first, rows, tile);
  if (block.given) {
    mark_given(block, first, rows, tile);
  } else if (block.columns.of == 0) {
    mark_selected(block, first, tile);
  }
  sweep<Vector>(tile, block.columns);
  store_tile(block, first, rows, tile);
}

template <class Vector, class T>
void prune_tiles(const std::vector<Block<T>>& blocks, int64_t rows) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for_ranges(std::ssize(blocks) * tiles, 1,
             [tiles, blocks = blocks.data()](int64_t begin, int64_t end) FEDSPA_BODY {
               for (int64_t tile = begin; tile < end; ++tile) {
                 prune_tile<Vector>(blocks[tile / tiles], tile % tiles * TILE_ROWS);
               }
             });
}

template <class T>
Rows<T> rows_of(const Tensor& tensor, int64_t matrix) {
  const int64_t first = matrix * tensor.stride(0);
  if constexpr (std::is_const_v<T>) {
    return {data<T>(tensor) + first, tensor.stride(1)};
  } else {
    return {mutable_data<T>(tensor) + first, tensor.stride(1)};
  }
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
           data<uint8_t>(dead) + n * cols,
           data<float>(damp)[n],
           rows_of<const T>(weight, n),
           update ? data<float>(*update) + n * rows * cols : nullptr,
           rows_of<T>(pruned, n),
           rows_of<uint8_t>(kept, n),
           rows_of<float>(change, n),
           mutable_data<float>(loss) + n * rows,
           mutable_data<int32_t>(invalid)});
      if (count >= 0) {
        blocks.back().selected = select_in_block(blocks.back(), count);
      }
    }
    if (instruction_set() == InstructionSet::AVX512) {
      prune_tiles<Vector16>(blocks, rows);
    } else {
      prune_tiles<Vector8>(blocks, rows);
    }
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("obs_prune_block_", TORCH_BOX(&obs_prune_block_));
}
