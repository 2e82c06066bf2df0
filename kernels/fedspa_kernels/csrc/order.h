// Integers that stand in the order of floats: exact comparisons, counts and thresholds need no
// floating point then. A score that is a product is still subject to torch.set_flush_denormal,
// which holds for the thread that called it alone.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FEDSPA_ANYWHERE __host__ __device__
#else
#define FEDSPA_ANYWHERE
#endif

namespace fedspa {

// The bits of a float32, or those of a half in the upper half of the word: either way a sign and a
// magnitude, which become an integer of that sign. Both zeros are 0. Never INT_MIN, nor one more
// but for a NaN, so that one less than a key is always there.
FEDSPA_ANYWHERE constexpr int32_t order_key(uint32_t bits) {
  const auto magnitude = static_cast<int32_t>(bits & 0x7fffffff);
  const int32_t sign = static_cast<int32_t>(bits) >> 31;
  return (magnitude ^ sign) - sign;
}

// The keys of infinity in float32 and bfloat16, and in float16. Only NaN lies beyond, on either
// side.
constexpr int32_t INFINITY_KEY = 0x7f800000;
constexpr int32_t HALF_INFINITY_KEY = 0x7c000000;

} // namespace fedspa
