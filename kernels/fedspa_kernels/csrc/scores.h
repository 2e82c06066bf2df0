// Scores of any dtype as keys, on the CPU.

#pragma once

#include <cpu.h>
#include <order.h>

#include <cstdint>
#include <type_traits>

namespace fedspa {

// What order_key() takes: halves are ordered like the float32 that they convert to.
FEDSPA_INLINE uint32_t order_bits(float value) {
  return float_bits(value);
}
FEDSPA_INLINE uint32_t order_bits(Half value) {
  return static_cast<uint32_t>(value.bits) << 16;
}
FEDSPA_INLINE uint32_t order_bits(BFloat16 value) {
  return static_cast<uint32_t>(value.bits) << 16;
}

// Whether the key of a score is beyond infinity.
template <class T>
FEDSPA_INLINE bool is_nan(int32_t key) {
  constexpr int32_t INFINITE = std::is_same_v<T, Half> ? HALF_INFINITY_KEY : INFINITY_KEY;
  return (key > INFINITE) | (key < -INFINITE);
}

} // namespace fedspa
