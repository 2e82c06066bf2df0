// Kernels that are right, and kernels with one mistake each, for test_shim.py.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <string_view>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr unsigned ALL = 0xffffffff;
constexpr unsigned BLOCK = 256;

unsigned* shared() {
  return static_cast<unsigned*>(shim::shared_memory());
}

unsigned position() {
  return blockIdx.x * blockDim.x + threadIdx.x;
}

// Every thread reads what another thread of its block wrote.
void reverse(unsigned* out) {
  shared()[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[position()] = shared()[BLOCK - 1 - threadIdx.x];
}

void reverse_without_barrier(unsigned* out) {
  shared()[threadIdx.x] = threadIdx.x;
  out[position()] = shared()[BLOCK - 1 - threadIdx.x];
}

// One word is used twice: nobody may write the second value before all have read the first.
template <bool BARRIER>
void use_twice(unsigned* out) {
  unsigned sum = 0;
  for (unsigned round = 1; round <= 2; ++round) {
    if (threadIdx.x == 0) {
      shared()[0] = round;
    }
    __syncthreads();
    sum += shared()[0];
    if (BARRIER) {
      __syncthreads();
    }
  }
  out[position()] = sum;
}

void neighbour_in_warp(unsigned* out, bool barrier) {
  shared()[threadIdx.x] = threadIdx.x;
  if (barrier) {
    __syncwarp();
  }
  out[position()] = shared()[threadIdx.x ^ 1];
}

// The sum of 0..255 in every thread: shuffles, shared memory, and shuffles again.
void reduce(unsigned* out) {
  unsigned sum = threadIdx.x;
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(ALL, sum, distance);
  }
  if (threadIdx.x % 32 == 0) {
    shared()[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  sum = threadIdx.x % 32 < BLOCK / 32 ? shared()[threadIdx.x % 32] : 0;
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(ALL, sum, distance);
  }
  out[position()] = __shfl_sync(ALL, sum, 0);
}

// Inclusive prefix sums of ones over groups of eight lanes.
void scan_of_eights(unsigned* out) {
  unsigned sum = 1;
  for (unsigned distance = 1; distance < 8; distance *= 2) {
    const unsigned before = __shfl_up_sync(ALL, sum, distance, 8);
    sum += threadIdx.x % 8 >= distance ? before : 0;
  }
  out[position()] = sum;
}

void votes(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned thirds = __ballot_sync(ALL, lane % 3 == 0);
  const unsigned equals = __match_any_sync(ALL, lane % 4);
  const bool all_and_any = __all_sync(ALL, lane < 32) && !__all_sync(ALL, lane < 31) &&
                           __any_sync(ALL, lane == 31) && !__any_sync(ALL, lane == 32);
  out[position()] = all_and_any ? thirds ^ equals : 0;
}

// The two halves of a warp go their own ways, and meet again.
void half_warps(unsigned* out) {
  unsigned sum = 0;
  if (threadIdx.x % 32 < 16) {
    sum = __shfl_sync(0x0000ffff, threadIdx.x, 3);
  } else {
    sum = __shfl_sync(0xffff0000, threadIdx.x, 20);
  }
  out[position()] = __shfl_xor_sync(ALL, sum, 16) % 32;
}

void histogram(unsigned* out) {
  atomicAdd(&out[threadIdx.x % 4], 1u);
  atomicMax(&out[4], position());
  atomicOr(&out[5], 1u << threadIdx.x % 32);
}

// Blocks do not run in the order of their numbers.
void last_block(unsigned* out) {
  if (threadIdx.x == 0) {
    out[0] = blockIdx.x;
  }
}

void barrier_in_a_branch(unsigned* out) {
  if (threadIdx.x < 128) {
    __syncthreads();
  }
  out[position()] = 0;
}

void two_barriers(unsigned*) {
  if (threadIdx.x < 128) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void write_behind(unsigned*) {
  shared()[threadIdx.x + 1] = 0;
}

void write_before(unsigned*) {
  *(shared() + threadIdx.x - 1) = 0;
}

void shuffle_with_absent_lane(unsigned* out) {
  if (threadIdx.x % 32 != 5) {
    out[position()] = __shfl_xor_sync(ALL, threadIdx.x, 1);
  }
}

void shuffle_outside_own_mask(unsigned* out) {
  out[position()] = __shfl_xor_sync(0x0000ffff, threadIdx.x, 1);
}

void shuffle_from_outside_mask(unsigned* out) {
  if (threadIdx.x % 32 < 16) {
    out[position()] = __shfl_sync(0x0000ffff, threadIdx.x, 16);
  }
}

void misaligned_vector(unsigned* out) {
  auto* vectors = reinterpret_cast<uint4*>(out + 1);
  vectors[threadIdx.x % 4] = make_uint4(0, 0, 0, 0);
}

void index_outside_of_array(unsigned* out) {
  unsigned registers[4] = {};
  out[position()] = registers[threadIdx.x % 8];
}

void shift_by_32(unsigned* out) {
  out[position()] = 1u << (threadIdx.x % 33);
}

struct Case {
  std::string_view name;
  void (*kernel)(unsigned* out);
  unsigned threads = BLOCK;
  size_t shared_bytes = BLOCK * sizeof(unsigned);
  unsigned rows = 1;
};

const Case CASES[] = {
    {"reverse", reverse},
    {"reverse_without_barrier", reverse_without_barrier},
    {"use_twice", use_twice<true>},
    {"use_twice_without_barrier", use_twice<false>},
    {"neighbour_in_warp", [](unsigned* out) { neighbour_in_warp(out, true); }},
    {"neighbour_in_warp_without_barrier", [](unsigned* out) { neighbour_in_warp(out, false); }},
    {"reduce", reduce},
    {"scan_of_eights", scan_of_eights},
    {"votes", votes},
    {"half_warps", half_warps},
    {"histogram", histogram},
    {"last_block", last_block},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"two_barriers", two_barriers},
    {"write_behind", write_behind},
    {"write_before", write_before},
    {"shuffle_with_absent_lane", shuffle_with_absent_lane},
    {"shuffle_beyond_the_block", reduce, 16},
    {"shuffle_outside_own_mask", shuffle_outside_own_mask},
    {"shuffle_from_outside_mask", shuffle_from_outside_mask},
    {"misaligned_vector", misaligned_vector},
    {"index_outside_of_array", index_outside_of_array},
    {"shift_by_32", shift_by_32},
    {"all_shared_memory", last_block, BLOCK, 227 * 1024},
    {"too_much_shared_memory", last_block, BLOCK, 227 * 1024 + 1},
    {"too_many_threads", last_block, 1025},
    {"too_many_rows_of_blocks", last_block, BLOCK, 0, 65536},
};

} // namespace

// Runs a case in two blocks; puts what was wrong into `message`, "" where nothing was.
EXPORT void run_case(const char* name, unsigned* out, char* message, size_t size) {
  std::snprintf(message, size, "no case of this name");
  for (const Case& one : CASES) {
    if (one.name == name) {
      message[0] = '\0';
      try {
        shim::run(dim3(2, one.rows), one.threads, one.shared_bytes, [&] { one.kernel(out); });
      } catch (const std::exception& error) {
        std::snprintf(message, size, "%s", error.what());
      }
    }
  }
}

EXPORT void round_halves(const float* in, uint16_t* halves, uint16_t* bfloats, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    halves[i] = __float2half_rn(in[i]).bits;
    bfloats[i] = __float2bfloat16_rn(in[i]).bits;
  }
}

EXPORT void widen_halves(const uint16_t* in, float* halves, float* bfloats, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    halves[i] = __half2float({in[i]});
    bfloats[i] = __bfloat162float({in[i]});
  }
}
