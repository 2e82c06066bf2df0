// The lower triangle of a symmetric product on the GPU; the product itself is PyTorch's.
//
// mirror_upper_  hessian (N, K, K) float32, changed: [n, k, j] := [n, j, k] for j < k

#include <torch/csrc/stable/library.h>
#include <grid.cuh>

namespace {

using namespace fedspa;

constexpr int TILE = 32;
constexpr int THREAD_ROWS = 8;
// A column of the tile then lies in 32 different banks of shared memory.
constexpr int PADDED = TILE + 1;
static_assert(TILE * PADDED * sizeof(float) <= SMALLEST_SHARED_LIMIT);

// One block transposes one tile on or above the diagonal. Row r of tiles has `tiles - r` of them,
// and the row that is as far from the bottom has r + 1. So two rows together have tiles + 1, and
// the tiles are a rectangle: `folded` of such pairs of rows a matrix.
__global__ void __launch_bounds__(TILE* THREAD_ROWS)
    mirror_tiles(float* __restrict__ hessian, int64_t size, unsigned tiles, unsigned folded) {
  const unsigned across = tiles + 1;
  const unsigned matrix = blockIdx.x / (folded * across);
  const unsigned pair = blockIdx.x / across % folded;
  const unsigned place = blockIdx.x % across;
  const bool upper = place < tiles - pair;
  const unsigned row = upper ? pair : tiles - 1 - pair;
  const unsigned column = upper ? pair + place : place - 1;
  if (!upper && row == pair) {
    return; // the middle row is its own partner
  }

  float* const square = hessian + matrix * size * size;
  float* const tile = shared_memory<float>();
  const int x = threadIdx.x;
#pragma unroll
  for (int y = threadIdx.y; y < TILE; y += THREAD_ROWS) {
    const int64_t from = static_cast<int64_t>(row) * TILE + y;
    const int64_t to = static_cast<int64_t>(column) * TILE + x;
    if (from < size && to < size) {
      tile[y * PADDED + x] = square[from * size + to];
    }
  }
  __syncthreads();
#pragma unroll
  for (int y = threadIdx.y; y < TILE; y += THREAD_ROWS) {
    const int64_t from = static_cast<int64_t>(row) * TILE + x;
    const int64_t to = static_cast<int64_t>(column) * TILE + y;
    if (from < to && to < size) {
      square[to * size + from] = tile[x * PADDED + y];
    }
  }
}

void mirror_upper_(Tensor hessian, int64_t stream) {
  check_contiguous("mirror_upper_", hessian, ScalarType::Float);
  STD_TORCH_CHECK(hessian.dim() == 3 && hessian.size(1) == hessian.size(2),
                  "mirror_upper_: needs (N, K, K)");
  if (hessian.numel() == 0) {
    return;
  }
  const Device device(hessian, stream);
  const int64_t size = hessian.size(1);
  const unsigned tiles = (size + TILE - 1) / TILE;
  const unsigned folded = (tiles + 1) / 2;
  const int64_t blocks = hessian.size(0) * folded * (tiles + 1);
  launch(device, mirror_tiles, blocks_for("mirror_upper_", blocks, 1), dim3(TILE, THREAD_ROWS),
         TILE * PADDED * sizeof(float), mutable_data<float>(hessian), size, tiles, folded);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, FEDSPA_DEVICE, m) {
  m.impl("mirror_upper_", TORCH_BOX(&mirror_upper_));
}
