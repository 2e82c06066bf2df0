// Exact selection by radix, in one block: the cut between what goes and what stays, found digit by
// digit from histograms of keys, and the marking of what goes. Integers only, so that the order of
// the atomic additions changes nothing.

#pragma once

#include <order.h>
#include <device.cuh>
#include <floats.cuh>

namespace fedspa {

// The bits of a key that stands in the order of the values of T, both zeros being one.
template <class T>
constexpr int KEY_BITS = 32;
template <>
constexpr int KEY_BITS<__half> = 19; // the mantissa is 13 bits shorter than float32's
template <>
constexpr int KEY_BITS<__nv_bfloat16> = 16;

template <class T>
__device__ uint32_t key_of(T value) {
  const auto key = static_cast<uint32_t>(order_key(__float_as_uint(to_float(value))));
  return (key ^ 0x80000000u) >> (32 - KEY_BITS<T>);
}

__device__ inline bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

__device__ inline bool is_nan(float value) {
  return value != value;
}

// The digits of a key are counted from its top: each has WIDTH bits, the last one what is left.
template <class Key>
struct Digit {
  Key above; // the bits of the digits before this one
  int shift;
  int width;

  __device__ int of(Key key) const { return static_cast<int>(key >> shift) & ((1 << width) - 1); }
};

template <int WIDTH, class Key>
__device__ Digit<Key> nth_digit(int bits, int nth) {
  constexpr int ALL = 8 * sizeof(Key);
  const int left = bits - nth * WIDTH;
  const int width = left < WIDTH ? left : WIDTH;
  const Key of_key = static_cast<Key>(~Key{0}) >> (ALL - bits);
  const Key not_above = static_cast<Key>(~Key{0}) >> (ALL - left);
  return {static_cast<Key>(of_key & ~not_above), left - width, width};
}

// What is below the key goes, and of the `equal` that equal it the first `ties`. Before the last
// digit is known: of the keys that share the known digits the `ties` smallest go.
template <class Key>
struct Cut {
  Key key;
  uint32_t ties;
  uint32_t equal;
};

// A block's shared memory. A warp whose lanes meet in one counter waits for each of them, and
// digits of floats are few (exponents) or one (votes): lanes therefore count in up to 32 copies.
template <int WIDTH>
struct alignas(16) Workspace {
  uint32_t counters[2 << WIDTH];
  uint32_t warps[32];
  uint32_t found[4];

  __device__ static int copies_of(int width) {
    return WIDTH + 1 - width < 5 ? WIDTH + 1 - width : 5; // the logarithm of their number
  }

  // Ahead of the counting of a digit of this width; a barrier stands between.
  __device__ void clear(int width) {
    for (int i = threadIdx.x; i < 1 << (width + copies_of(width)); i += blockDim.x) {
      counters[i] = 0;
    }
  }

  __device__ void add(int digit, int log2_copies) {
    const int copy = threadIdx.x & ((1 << log2_copies) - 1);
    atomicAdd(&counters[(digit << log2_copies) + copy], 1u);
  }

  __device__ uint32_t count(int digit, int log2_copies) const {
    uint32_t sum = 0;
    for (int copy = 0; copy < 1 << log2_copies; ++copy) {
      // Neighbouring lanes start at different copies, which lie in different banks.
      sum += counters[(digit << log2_copies) + ((copy + threadIdx.x) & ((1 << log2_copies) - 1))];
    }
    return sum;
  }
};

__device__ inline uint32_t warp_inclusive_sum(uint32_t value) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(~0u, value, distance);
    value += lane >= distance ? before : 0;
  }
  return value;
}

// The sum of the values of all threads before this one, and that of all threads. Every thread of
// the block calls it; warps: 32 words of shared memory.
__device__ inline uint32_t exclusive_sum(uint32_t value, uint32_t* warps, uint32_t& total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t up_to = warp_inclusive_sum(value);
  __syncthreads(); // the readers of the last call are done
  if (lane == 31) {
    warps[warp] = up_to;
  }
  __syncthreads();
  const uint32_t warps_up_to = warp_inclusive_sum(lane < blockDim.x / 32 ? warps[lane] : 0);
  total = __shfl_sync(~0u, warps_up_to, 31);
  const uint32_t before = __shfl_sync(~0u, warps_up_to, warp == 0 ? 0 : warp - 1);
  return (warp == 0 ? 0 : before) + up_to - value;
}

// Narrows a cut by one digit: count(d) says how many keys with the known digits have d next. Every
// thread calls it, after a barrier; when it returns, nobody reads the counts any more.
template <int WIDTH, class Key, class Count>
__device__ Cut<Key> narrow(Workspace<WIDTH>& workspace, const Digit<Key>& digit,
                           const Cut<Key>& cut, const Count& count) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int bins = 1 << digit.width;
  // Each warp has a range of the bins, whole steps of 32.
  const int span = (bins + 32 * warps - 1) / (32 * warps) * 32;
  const int begin = warp * span, end = begin + span < bins ? begin + span : bins;
  uint32_t sum = 0;
  for (int bin = begin + lane; bin < end; bin += 32) {
    sum += count(bin);
  }
  sum = __shfl_sync(~0u, warp_inclusive_sum(sum), 31);
  if (lane == 0) {
    workspace.warps[warp] = sum;
  }
  __syncthreads();
  uint32_t before = 0;
  for (int other = 0; other < warp; ++other) {
    before += workspace.warps[other];
  }
  if (before < cut.ties && cut.ties - before <= sum) {
    for (int step = begin; step < end; step += 32) {
      const uint32_t here = step + lane < bins ? count(step + lane) : 0;
      const uint32_t up_to = before + warp_inclusive_sum(here);
      const unsigned reached = __ballot_sync(~0u, up_to >= cut.ties);
      if (reached != 0) {
        if (lane == __ffs(reached) - 1) {
          workspace.found[0] = step + lane;
          workspace.found[1] = up_to - here;
          workspace.found[2] = here;
        }
        break;
      }
      before = __shfl_sync(~0u, up_to, 31);
    }
  }
  __syncthreads();
  return {static_cast<Key>(cut.key | static_cast<Key>(workspace.found[0]) << digit.shift),
          cut.ties - workspace.found[1], workspace.found[2]};
}

// Counts the digits of those of n keys that share the cut's known digits. fetch(offset, valid,
// keys) yields N neighbours. Begins and ends with a barrier.
template <int N, int WIDTH, class Key, class Fetch>
__device__ void count_digits(Workspace<WIDTH>& workspace, const Digit<Key>& digit, Key known,
                             int64_t n, const Fetch& fetch) {
  const int copies = workspace.copies_of(digit.width);
  workspace.clear(digit.width);
  __syncthreads();
  for (int64_t offset = threadIdx.x * N; offset < n; offset += blockDim.x * N) {
    const int valid = n - offset < N ? static_cast<int>(n - offset) : N;
    Key keys[N];
    fetch(offset, valid, keys);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < valid && ((keys[j] ^ known) & digit.above) == 0) {
        workspace.add(digit.of(keys[j]), copies);
      }
    }
  }
  __syncthreads();
}

// Marks n entries from index on, in order: what is below the key, and the first `room` of the
// `tied` that equal it. visit(offset, valid, elements, keys) yields the entries.
template <class Source, class Key, class Visit>
__device__ void mark(const Source& source, int64_t index, int64_t n, uint32_t* warps, Key key,
                     uint32_t room, uint32_t tied, const Visit& visit) {
  constexpr int VECTOR = Source::VECTOR;
  uint32_t ties_before = 0;
  for (int64_t begin = 0; begin < n; begin += blockDim.x * VECTOR) {
    const int64_t offset = begin + threadIdx.x * VECTOR;
    const int64_t left = n - offset;
    const int valid = left < VECTOR ? (left < 0 ? 0 : static_cast<int>(left)) : VECTOR;
    typename Source::Element elements[VECTOR] = {};
    Key keys[VECTOR] = {};
    if (valid > 0) {
      visit(offset, valid, elements, keys);
    }
    uint32_t goes = 0, ties = 0;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      goes |= static_cast<uint32_t>(j < valid && keys[j] < key) << j;
      ties |= static_cast<uint32_t>(j < valid && keys[j] == key) << j;
    }
    if (room > 0 && tied <= room) {
      goes |= ties;
    } else if (room > 0) {
      uint32_t total = 0;
      uint32_t rank = ties_before + exclusive_sum(__popc(ties), warps, total);
      ties_before += total;
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        const uint32_t tie = ties >> j & 1;
        goes |= (tie & (rank < room)) << j;
        rank += tie;
      }
    }
    if (valid > 0) {
      source.store(index + offset, valid, elements, goes);
    }
  }
}

} // namespace fedspa
