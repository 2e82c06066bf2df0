// The sweep over the columns of a block: four lanes hold a row's weights in registers, and the
// inverse is in shared memory.

#pragma once

#include <grid.cuh>

#include "block.cuh"
#include "on_chip.cuh"

namespace fedspa::obs {

__device__ inline float pick(const float (&four)[4], int nth) {
  const float low = nth & 1 ? four[1] : four[0], high = nth & 1 ? four[3] : four[2];
  return nth & 2 ? high : low;
}

// A lane's share of a row: columns 16 p + 4 lane + c, by panel p and c. Every loop over the panels
// is unrolled, since registers cannot be indexed.
struct Share {
  float weights[PANELS][4];
  uint32_t goes = 0; // bit 4 p + c
  int lane = threadIdx.x % LANES;

  __device__ int col(int panel) const { return PANEL * panel + 4 * lane; }
};

// Lets the of - keep smallest of the columns k, k + 1, ... k + of - 1 go, all of them in panels
// from `panel` on.
__device__ inline void decide(const Share& share, const OnChip& on_chip, int panel, int k, int of,
                              int keep) {
  const int slot = threadIdx.x / LANES;
  uint32_t* const scores = on_chip.scores + slot * on_chip.stride;
#pragma unroll
  for (int p = 0; p < PANELS; ++p) {
    if (p >= panel && PANEL * p < k + of) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int col = share.col(p) + c;
        if (k <= col && col < k + of) {
          const float score = __fmul_rn(share.weights[p][c], on_chip.scale[col]);
          scores[col - k] = __float_as_uint(score) & 0x7fffffffu;
        }
      }
    }
  }
  __syncwarp();
  for (int nth = share.lane; nth < of; nth += LANES) {
    const uint32_t own = scores[nth];
    int rank = 0;
    for (int other = 0; other < of; ++other) {
      rank += scores[other] < own || (scores[other] == own && other < nth);
    }
    if (rank < of - keep) {
      const int col = k + nth;
      atomicOr(&on_chip.going[slot * LANES + col / 32], 1u << col % 32);
    }
  }
  __syncwarp();
}

// SparseGPT's loop: w_j -= e_k * inverse[k, j] for j > k, e_k = w_k * scale_k where w_k goes.
// Returns the sum of e_k^2. The entries of the inverse before column k are 0, and what it does to
// w_k itself is not seen, for w_k goes or e_k is 0.
template <bool PATTERN>
__device__ float sweep_row(Share& share, const OnChip& on_chip, int cols, int of, int keep) {
  // With a pattern a step has much more code: one copy for each panel is enough. A host compiler
  // (tests/shim) does not know the pragma, and would call the number unused.
  [[maybe_unused]] constexpr int UNROLL = PATTERN ? 1 : 4;
  const uint32_t* const going = on_chip.going + threadIdx.x / LANES * LANES;
  const int first_lane = threadIdx.x % 32 / LANES * LANES;
  int next_group = 0;
  float loss = 0.0f;
#pragma unroll
  for (int panel = 0; panel < PANELS; ++panel) {
    float scales[4];
    read(on_chip.scale + share.col(panel), 4, true, scales);
#pragma unroll 1
    for (int owner = 0; owner < LANES; ++owner) {
#pragma unroll UNROLL
      for (int c = 0; c < 4; ++c) {
        const int k = PANEL * panel + 4 * owner + c;
        if (k < cols) {
          if constexpr (PATTERN) {
            if (k == next_group) {
              decide(share, on_chip, panel, k, of, keep);
              next_group += of;
            }
            const int own = share.col(panel) + c;
            share.goes |= (going[own / 32] >> own % 32 & 1) << (4 * panel + c);
          }
          const bool goes = share.goes >> (4 * panel + c) & 1;
          const float own = goes ? pick(share.weights[panel], c) * pick(scales, c) : 0.0f;
          const float error = __shfl_sync(~0u, own, first_lane + owner);
          loss = fmaf(error, error, loss);
#pragma unroll
          for (int p = 0; p < PANELS; ++p) {
            if (p >= panel) {
              float factors[4];
              read(on_chip.inverse + k * MOST_COLS + share.col(p), 4, true, factors);
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                share.weights[p][j] = fmaf(-error, factors[j], share.weights[p][j]);
              }
            }
          }
        }
      }
    }
  }
  return loss;
}

// Reads a share of a row; returns the sum of what dead columns lose, over the lanes of the row.
template <bool PATTERN, class T>
__device__ float load_share(const Block<T>& block, int64_t nth, int64_t row, Share& share) {
  bool wrong = false;
  float lost = 0.0f;
#pragma unroll
  for (int p = 0; p < PANELS; ++p) {
    const int left = row < block.rows ? block.cols - share.col(p) : 0;
    const int valid = left < 4 ? (left < 0 ? 0 : left) : 4;
    T raw[4];
    float alive[4];
    block.start(nth, row, share.col(p), valid, valid == 4, raw, alive, share.weights[p]);
    bool kept[4];
    if constexpr (!PATTERN) {
      read(block.kept.at(nth, row, share.col(p)), valid, valid == 4 && block.kept.aligned, kept);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float dead = to_float(raw[j]) - alive[j];
      lost = fmaf(dead, dead, lost);
      wrong = wrong || !is_finite(to_float(raw[j]));
      if constexpr (!PATTERN) {
        share.goes |= static_cast<uint32_t>(!kept[j]) << (4 * p + j);
      }
    }
  }
  if (wrong) {
    atomicOr(block.invalid, 1);
  }
  lost += __shfl_xor_sync(~0u, lost, 1);
  return lost + __shfl_xor_sync(~0u, lost, 2);
}

template <bool PATTERN, class T>
__device__ void store_share(const Block<T>& block, int64_t nth, int64_t row, const Share& share) {
#pragma unroll
  for (int p = 0; p < PANELS; ++p) {
    const int col = share.col(p), left = block.cols - col;
    const int valid = left < 4 ? (left < 0 ? 0 : left) : 4;
    const bool whole = valid == 4;
    T raw[4], pruned[4];
    float alive[4], started[4], change[4];
    bool kept[4];
    block.start(nth, row, col, valid, whole, raw, alive, started);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      kept[j] = !(share.goes >> (4 * p + j) & 1);
      const float final = kept[j] ? share.weights[p][j] : 0.0f;
      pruned[j] = from_float<T>(final);
      change[j] = alive[j] - final;
    }
    write(block.pruned.at(nth, row, col), valid, whole && block.pruned.aligned, pruned);
    write(block.change.at(nth, row, col), valid, whole && block.change.aligned, change);
    if constexpr (PATTERN) {
      write(block.kept.at(nth, row, col), valid, whole && block.kept.aligned, kept);
    }
  }
}

template <bool PATTERN, class T>
__global__ void __launch_bounds__(MOST_THREADS) sweep(const Block<T> block, int64_t tiles) {
  const int64_t nth = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x - nth * tiles;
  const int64_t row = tile * (blockDim.x / LANES) + threadIdx.x / LANES;
  const OnChip on_chip(block.cols, block.of);
  load_on_chip(block, nth, on_chip);
  if constexpr (PATTERN) {
    on_chip.going[threadIdx.x] = 0;
  }
  // Rows beyond the last take part in the warps' operations, as zeros.
  Share share;
  const float dead = load_share<PATTERN>(block, nth, row, share);
  __syncthreads();
  const float loss = sweep_row<PATTERN>(share, on_chip, block.cols, block.of, block.keep);
  if (row < block.rows) {
    store_share<PATTERN>(block, nth, row, share);
    if (share.lane == 0) {
      block.loss[nth * block.rows + row] += loss + block.damp[nth] * dead;
    }
  }
}

template <class T>
void launch_sweep(const Device& device, const Block<T>& block, int64_t matrices) {
  // Large thread blocks share the inverse between more rows; small ones keep the GPU busy, which
  // it is as long as three quarters of it are.
  int threads = MOST_THREADS;
  const auto tiles_of = [&] { return (block.rows * LANES + threads - 1) / threads; };
  while (threads > 32 && 4 * matrices * tiles_of() < 3 * multiprocessors(device)) {
    threads /= 2;
  }
  const size_t bytes = OnChip::bytes(block.cols, block.of, threads);
  const auto kernel = block.of > 0 ? &sweep<true, T> : &sweep<false, T>;
  const unsigned blocks = blocks_for("obs_prune_block_", matrices * tiles_of(), 1);
  launch(device, kernel, blocks, threads, bytes, block, tiles_of());
}

} // namespace fedspa::obs
