// float16, in integers: g++ knows _Float16 on some machines only.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = value.bits >> 10 & 0x1f;
  const int fraction = value.bits & 0x3ff;
  if (exponent == 0x1f) {
    return sign * (fraction == 0 ? INFINITY : NAN);
  }
  // Below exponent 1 the numbers are subnormal: as far apart as there, without the leading bit.
  return exponent == 0 ? sign * std::ldexp(static_cast<float>(fraction), -24)
                       : sign * std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) {
    return {0x7fff};
  }
  if (size >= 65520.0f) {
    return {static_cast<uint16_t>(sign | 0x7c00)};
  }
  // The distance of float16 numbers around here is 2^(exponent - 10); nearbyint rounds to even.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  // A step beyond the last of an exponent carries into the next, as it should.
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps))};
}
