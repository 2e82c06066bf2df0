// Masks as bits and back on the GPU: bits of any rows, two bytes of them a thread where rows end
// with a byte.

#pragma once

#include <grid.cuh>
#include <neighbours.cuh>

namespace fedspa::bitmask {

constexpr int BLOCK = 256;

// Four bools in a word's bytes, as four bits. A bool may be any byte but 0 where the tensor is a
// view of bytes, so that each becomes its own 0 or 1 first. The product moves byte i to bit 28 + i,
// and no two of its partial products meet in a bit, so nothing carries.
__device__ inline unsigned packed(unsigned bools) {
  const unsigned ones = ((((bools & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bools) >> 7) & 0x01010101u;
  return (ones * 0x10204080u) >> 28;
}

// Four bits as four bools: bit i is moved to bit 8i, and what else the product has is cut off.
__device__ inline unsigned unpacked(unsigned bits) {
  return ((bits & 15) * 0x00204081u) & 0x01010101u;
}

// How the bytes of bits lie in rows of n entries.
struct Rows {
  int64_t n;
  int64_t bytes; // of all rows
  Divisor row_bytes;

  // Calls call(entry, count) with the first entry of a byte and how many it has, up to eight.
  template <class Call>
  __device__ void entries(int64_t byte, const Call& call) const {
    const int64_t row = row_bytes.quotient(byte);
    const int64_t column = (byte - row * row_bytes.divisor()) * 8;
    call(row * n + column, static_cast<int>(n - column < 8 ? n - column : 8));
  }
};

// The first `pairs` threads take two bytes of bits each, and the others one.
static __global__ void __launch_bounds__(BLOCK)
    pack_bytes(const uint8_t* __restrict__ mask, Rows rows, int64_t pairs,
               uint8_t* __restrict__ bits) {
  const int64_t number = thread_number();
  const int64_t byte = number + pairs;
  if (number < pairs) {
    const uint4 bools = reinterpret_cast<const uint4*>(mask)[number];
    reinterpret_cast<uint16_t*>(bits)[number] =
        packed(bools.x) | packed(bools.y) << 4 | packed(bools.z) << 8 | packed(bools.w) << 12;
  } else if (byte < rows.bytes) {
    rows.entries(byte, [&](int64_t entry, int count) {
      unsigned value = 0;
      for (int i = 0; i < count; ++i) {
        value |= static_cast<unsigned>(mask[entry + i] != 0) << i;
      }
      bits[byte] = value;
    });
  }
}

static __global__ void __launch_bounds__(BLOCK)
    unpack_bytes(const uint8_t* __restrict__ bits, Rows rows, int64_t pairs,
                 uint8_t* __restrict__ mask) {
  const int64_t number = thread_number();
  const int64_t byte = number + pairs;
  if (number < pairs) {
    const unsigned pair = reinterpret_cast<const uint16_t*>(bits)[number];
    reinterpret_cast<uint4*>(mask)[number] =
        make_uint4(unpacked(pair), unpacked(pair >> 4), unpacked(pair >> 8), unpacked(pair >> 12));
  } else if (byte < rows.bytes) {
    rows.entries(byte, [&](int64_t entry, int count) {
      for (int i = 0; i < count; ++i) {
        mask[entry + i] = bits[byte] >> i & 1;
      }
    });
  }
}

} // namespace fedspa::bitmask
