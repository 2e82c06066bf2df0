// One block of columns of SparseGPT's update on the GPU. With a count, a radix selection
// (csrc/groups.cuh) writes the mask first, from the weights as the block starts; then one launch
// sweeps over the columns (sweep.cuh), by that mask, a given one, or a pattern of its own.

#include <torch/csrc/stable/library.h>
#include <groups.cuh>

#include <optional>

#include "block.cuh"
#include "sweep.cuh"

namespace fedspa::obs {
namespace {

// What competes in one matrix: |start| times scale, all rows of the block.
template <class T>
struct StartScores {
  using Key = uint32_t;
  using Element = Key;
  static constexpr int VECTOR = 4;
  static constexpr bool KEYS_ON_CHIP = false; // its elements are its keys
  static constexpr int bits = 31; // a product without its sign

  Block<T> block;
  Divisor cols;
  Divisor rows;
  bool aligned; // four neighbours are in one row

  template <int N>
  __device__ void load(int64_t index, int valid, Key (&elements)[N]) const {
    if (N == VECTOR && aligned) {
      load_in_row(index, elements);
      return;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < valid) {
        Key one[1];
        load_in_row(index + j, one);
        elements[j] = one[0];
      }
    }
  }

  template <int N>
  __device__ void load_in_row(int64_t index, Key (&elements)[N]) const {
    const int64_t row = cols.quotient(index), nth = rows.quotient(row);
    const int col = static_cast<int>(index - row * cols.divisor());
    T raw[N];
    float alive[N], started[N], scales[N];
    block.start(nth, row - nth * block.rows, col, N, N == VECTOR, raw, alive, started);
    read(block.scale + nth * block.cols + col, N, false, scales);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      elements[j] = __float_as_uint(__fmul_rn(started[j], scales[j])) & 0x7fffffffu;
    }
  }

  template <int N>
  __device__ void keys(int64_t, int, const Key (&elements)[N], Key (&keys)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      keys[j] = elements[j];
    }
  }

  template <int N>
  __device__ void store(int64_t index, int valid, const Key (&)[N], uint32_t goes) const {
    if (N == VECTOR && aligned) {
      const int64_t row = cols.quotient(index), nth = rows.quotient(row);
      const int col = static_cast<int>(index - row * cols.divisor());
      const bool kept[4] = {!(goes & 1), !(goes & 2), !(goes & 4), !(goes & 8)};
      write(block.kept.at(nth, row - nth * block.rows, col), 4, block.kept.aligned, kept);
      return;
    }
    for (int j = 0; j < valid; ++j) {
      const int64_t row = cols.quotient(index + j), nth = rows.quotient(row);
      const int col = static_cast<int>(index + j - row * cols.divisor());
      *block.kept.at(nth, row - nth * block.rows, col) = !(goes >> j & 1);
    }
  }
};

void check_tensors(const Tensor& weight, const std::optional<Tensor>& update, const Tensor& scale,
                   const Tensor& dead, const Tensor& damp, const Tensor& inverse) {
  check_weight("obs_prune_block_", weight);
  STD_TORCH_CHECK(weight.dim() == 3, "obs_prune_block_: needs a weight (matrices, rows, cols)");
  const int64_t matrices = weight.size(0), rows = weight.size(1), cols = weight.size(2);
  STD_TORCH_CHECK(cols <= MOST_COLS, "obs_prune_block_: ", cols, " columns, and at most ",
                  MOST_COLS, " fit");
  if (update) {
    check_contiguous("obs_prune_block_: update", *update, ScalarType::Float);
    check_sizes("obs_prune_block_: update", *update, {matrices, rows, cols});
  }
  check_contiguous("obs_prune_block_: scale", scale, ScalarType::Float);
  check_sizes("obs_prune_block_: scale", scale, {matrices, cols});
  check_contiguous("obs_prune_block_: dead", dead, ScalarType::Bool);
  check_sizes("obs_prune_block_: dead", dead, {matrices, cols});
  check_contiguous("obs_prune_block_: damp", damp, ScalarType::Float);
  check_sizes("obs_prune_block_: damp", damp, {matrices});
  check_contiguous("obs_prune_block_: inverse", inverse, ScalarType::Float);
  check_sizes("obs_prune_block_: inverse", inverse, {matrices, cols, cols});
}

void check_view(const char* name, const Tensor& tensor, const Tensor& weight, ScalarType dtype) {
  check_dtype(name, tensor, dtype);
  check_sizes(name, tensor, {weight.size(0), weight.size(1), weight.size(2)});
  STD_TORCH_CHECK(tensor.size(2) <= 1 || tensor.strides()[2] == 1, name,
                  ": needs neighbouring columns");
}

void obs_prune_block_(const Tensor& weight, const std::optional<Tensor>& update,
                      const Tensor& scale, const Tensor& dead, const Tensor& damp,
                      const Tensor& inverse, int64_t count, int64_t keep, int64_t of,
                      const Tensor& pruned, const Tensor& kept, const Tensor& change,
                      const Tensor& loss, const Tensor& invalid, int64_t stream) {
  check_tensors(weight, update, scale, dead, damp, inverse);
  check_view("obs_prune_block_: weight", weight, weight, weight.scalar_type());
  check_view("obs_prune_block_: pruned", pruned, weight, weight.scalar_type());
  check_view("obs_prune_block_: kept", kept, weight, ScalarType::Bool);
  check_view("obs_prune_block_: change", change, weight, ScalarType::Float);
  const int64_t matrices = weight.size(0), rows = weight.size(1), cols = weight.size(2);
  check_contiguous("obs_prune_block_: loss", loss, ScalarType::Float);
  check_sizes("obs_prune_block_: loss", loss, {matrices, rows});
  check_contiguous("obs_prune_block_: invalid", invalid, ScalarType::Int);
  check_sizes("obs_prune_block_: invalid", invalid, {1});
  STD_TORCH_CHECK(count <= rows * cols && (of <= 0 || (cols % of == 0 && keep >= 0)),
                  "obs_prune_block_: count, keep or of is out of range");
  if (weight.numel() == 0) {
    return;
  }
  const Device device(weight, stream);
  for_weight_dtype("obs_prune_block_", weight, [&]<class T>() {
    const auto no_update = View<const float>{nullptr, 0, 0, false};
    const bool aligned_inverse = is_aligned(data<float>(inverse), 16) && cols % 4 == 0;
    const Block<T> block{view_of(data<T>(weight), weight),
                         update ? view_of(data<float>(*update), *update) : no_update,
                         data<float>(scale),
                         data<bool>(dead),
                         data<float>(damp),
                         data<float>(inverse),
                         view_of(mutable_data<T>(pruned), pruned),
                         view_of(mutable_data<bool>(kept), kept),
                         view_of(mutable_data<float>(change), change),
                         mutable_data<float>(loss),
                         mutable_data<int>(invalid),
                         rows,
                         static_cast<int>(cols),
                         static_cast<int>(keep),
                         static_cast<int>(count < 0 && of > 0 ? of : 0),
                         aligned_inverse};
    if (count >= 0) {
      const StartScores<T> source{block, Divisor(cols), Divisor(rows), cols % 4 == 0};
      select_smallest(device, weight, source, matrices, rows * cols, count);
    }
    launch_sweep(device, block, matrices);
  });
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, FEDSPA_DEVICE, m) {
  m.impl("obs_prune_block_", TORCH_BOX(&obs_prune_block_));
}

} // namespace
} // namespace fedspa::obs
