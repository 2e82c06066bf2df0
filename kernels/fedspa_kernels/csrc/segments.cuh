// The bits of a row and the values that belong to them, one segment of the row to a block.
//
// A bit's value stands at the segment's offset plus the number of set bits before it. So a block
// counts the bits of its segment's words, and then takes 32 elements at a time, a lane each: loads
// and stores of a warp lie side by side on both sides.

#pragma once

#include <grid.cuh>

namespace fedspa {

constexpr int SEGMENT = 8192; // the largest
constexpr int SEGMENT_WORDS = SEGMENT / 32;
constexpr int SEGMENT_BLOCK = 1024; // threads
constexpr int SEGMENT_WARPS = SEGMENT_BLOCK / 32;
constexpr int WORDS_PER_WARP = SEGMENT_WORDS / SEGMENT_WARPS;

// What all rows have in common.
struct Segments {
  int64_t n; // elements in a row
  int64_t row_bytes; // of bits
  int64_t per_row; // segments
  int segment; // elements in a segment, the last one of a row excepted
};

inline Segments make_segments(const char* name, int64_t n, int64_t segment) {
  STD_TORCH_CHECK(n > 0, name, ": needs n > 0");
  STD_TORCH_CHECK(segment > 0 && segment <= SEGMENT && segment % 8 == 0, name, ": a segment of ",
                  segment, " elements is not a multiple of 8 up to ", SEGMENT);
  return {n, (n + 7) / 8, (n + segment - 1) / segment, static_cast<int>(segment)};
}

// Returns the rows.
inline int64_t check_bits(const char* name, const Tensor& bits, const Segments& segments) {
  check_contiguous(name, bits, ScalarType::Byte);
  STD_TORCH_CHECK(bits.dim() == 2 && bits.size(1) == segments.row_bytes, name, ": rows of ",
                  segments.n, " elements need bits (rows, ", segments.row_bytes, ")");
  return bits.size(0);
}

inline void check_rows(const char* name, const Tensor& bits, const Tensor& offsets, int64_t rows,
                       const Segments& segments) {
  STD_TORCH_CHECK(check_bits(name, bits, segments) == rows, name, ": needs bits for ", rows,
                  " rows");
  check_contiguous(name, offsets, ScalarType::Long);
  check_sizes(name, offsets, {rows * segments.per_row});
}

// Where a block's segment lies.
struct Place {
  int64_t element; // its first, in the whole tensor
  int64_t byte; // of bits
  int length; // elements
};

__device__ inline Place place_of(const Segments& all, int64_t number) {
  const int64_t row = number / all.per_row;
  const int64_t column = number % all.per_row * all.segment;
  const int64_t left = all.n - column;
  return {row * all.n + column, row * all.row_bytes + column / 8,
          left < all.segment ? static_cast<int>(left) : all.segment};
}

// 32 bits of a segment of `length` bits, zeros beyond it; rows can begin at any byte.
__device__ inline unsigned load_bits(const uint8_t* bits, int word, int length) {
  const int left = length - 32 * word;
  const uint8_t* const bytes = bits + 4 * word;
  if (left >= 32 && reinterpret_cast<uintptr_t>(bytes) % 4 == 0) {
    return load_constant(reinterpret_cast<const unsigned*>(bytes));
  }
  unsigned value = 0;
  for (int i = 0; i < 4 && 8 * i < left; ++i) {
    value |= static_cast<unsigned>(load_constant(bytes + i)) << 8 * i;
  }
  return left >= 32 ? value : left > 0 ? value & ((1u << left) - 1) : 0;
}

// In shared memory.
struct SegmentIndex {
  uint2 words[SEGMENT_WORDS]; // the bits, and how many are set before them in their 32 words
  unsigned counts[SEGMENT_WORDS / 32]; // set bits in each 32 words
};
static_assert(2 * sizeof(SegmentIndex) <= SMALLEST_SHARED_LIMIT); // the averages have two

// Called by a whole block of SEGMENT_BLOCK threads, whose first SEGMENT_WORDS bring a word each.
__device__ inline void fill_index(SegmentIndex* index, unsigned word) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < SEGMENT_WORDS) {
    const unsigned count = __popc(word);
    unsigned sum = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned before = __shfl_up_sync(0xffffffff, sum, distance);
      sum += lane >= distance ? before : 0;
    }
    index->words[threadIdx.x] = make_uint2(word, sum - count);
    if (lane == 31) {
      index->counts[threadIdx.x / 32] = sum;
    }
  }
  __syncthreads();
}

// The element of the segment that is this thread's i-th, for i < WORDS_PER_WARP.
__device__ inline int element_of_thread(int i) {
  return 32 * (threadIdx.x / 32 * WORDS_PER_WARP + i) + threadIdx.x % 32;
}

// Calls call(i, kept, value) for this thread's elements: whether the i-th one's bit is set, and if
// so, the number of its value among the segment's. i is a constant once the loop is unrolled.
template <class Call>
__device__ void for_each_bit(const SegmentIndex* index, const Call& call) {
  const int lane = threadIdx.x % 32;
  const int first = threadIdx.x / 32 * WORDS_PER_WARP;
  unsigned before = 0;
  for (int i = 0; i < first / 32; ++i) {
    before += index->counts[i];
  }
#pragma unroll
  for (int i = 0; i < WORDS_PER_WARP; ++i) {
    const uint2 word = index->words[first + i];
    const unsigned lower = word.x & ((1u << lane) - 1);
    call(i, (word.x >> lane & 1) != 0, before + word.y + __popc(lower));
  }
}

} // namespace fedspa
