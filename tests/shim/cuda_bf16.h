// bfloat16: the upper half of a float32.

#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(uint32_t{value.bits} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) {
    return {0x7fff};
  }
  const uint32_t to_even = 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>((bits + to_even) >> 16)};
}
