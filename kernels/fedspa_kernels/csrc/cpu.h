// What the CPU backends share: the instruction set chosen at run time, and the weights' dtypes.
//
// One binary serves every x86-64 machine: for_ranges compiles its body once for each instruction
// set and runs the widest that the machine has. No file is compiled with -march, which would let
// the linker pick a wide copy of an inline function for a narrow machine. On other processors the
// body is compiled once, for the compiler's baseline.

#pragma once

#include <tensors.h>

#include <bit>
#include <cstdint>

// Both say: compiled anew inside each caller, and so with the caller's instruction set. A body, and
// every function of ours that its loops call, needs one; otherwise it stays at the baseline.
#define FEDSPA_INLINE inline __attribute__((always_inline))
#define FEDSPA_BODY __attribute__((always_inline))

namespace fedspa {

enum class InstructionSet { BASELINE, AVX2, AVX512 };

#if defined(__x86_64__)

inline InstructionSet detect_instruction_set() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return !avx2 ? InstructionSet::BASELINE : avx512 ? InstructionSet::AVX512 : InstructionSet::AVX2;
}

#if defined(__clang__)
#define FEDSPA_FULL_VECTORS __attribute__((min_vector_width(512)))
#else
#define FEDSPA_FULL_VECTORS __attribute__((target("prefer-vector-width=512")))
#endif

template <class Body>
__attribute__((target("avx2,fma,bmi,bmi2,popcnt"))) void run_with_avx2(Body body) {
  body();
}

template <class Body>
FEDSPA_FULL_VECTORS
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt"))) void
    run_with_avx512(Body body) {
  body();
}

#else

inline InstructionSet detect_instruction_set() {
  return InstructionSet::BASELINE;
}

#endif

inline InstructionSet instruction_set() {
  static const InstructionSet widest = detect_instruction_set();
  return widest;
}

// Runs body() with the widest instruction set. The body is taken by value, and should capture by
// value: a store through a byte pointer could change what a reference leads to, for all that the
// compiler knows, so that it would be read anew for every element.
template <class Body>
void vectorised(Body body) {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::AVX512:
      return run_with_avx512(body);
    case InstructionSet::AVX2:
      return run_with_avx2(body);
    case InstructionSet::BASELINE:
      break;
  }
#endif
  body();
}

// Runs body(begin, end), vectorised, over ranges that cover 0 <= i < n, on all of PyTorch's threads
// where each gets `grain` or more:
//   for_ranges(n, grain, [=](int64_t begin, int64_t end) FEDSPA_BODY { ... });
template <class Body>
void for_ranges(int64_t n, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    vectorised([body, begin, end]() FEDSPA_BODY { body(begin, end); });
  });
}

// Weights as they lie in memory. PyTorch's own types do the same work, through a table or an
// instruction of one processor, which loops over them do not vectorise.
struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Calls call.operator()<T>() with the T of a weight's dtype: [&]<class T>() { ... }
template <class Call>
void for_weight_dtype(const char* name, const Tensor& weight, const Call& call) {
  check_weight(name, weight);
  switch (weight.scalar_type()) {
    case ScalarType::Half:
      return call.template operator()<Half>();
    case ScalarType::BFloat16:
      return call.template operator()<BFloat16>();
    default:
      return call.template operator()<float>();
  }
}

FEDSPA_INLINE uint32_t float_bits(float value) {
  return std::bit_cast<uint32_t>(value);
}

FEDSPA_INLINE float float_of(uint32_t bits) {
  return std::bit_cast<float>(bits);
}

// Without a comparison of floats, which a NaN would make a slow one.
FEDSPA_INLINE bool is_finite(float value) {
  return (float_bits(value) & 0x7f800000) != 0x7f800000;
}

FEDSPA_INLINE float to_float(float value) {
  return value;
}

FEDSPA_INLINE float to_float(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

// A normal half gets its exponent by a product, infinity and NaN with it; a subnormal one by a
// difference, because products with subnormal numbers are slow, or flushed to zero on request.
FEDSPA_INLINE float to_float(Half value) {
  const uint32_t bits = value.bits;
  const uint32_t magnitude = bits & 0x7fff;
  const float normal = float_of((magnitude << 13) + (224u << 23)) * 0x1p-112f;
  const float subnormal = float_of(magnitude | (126u << 23)) - 0.5f;
  const uint32_t chosen = magnitude < 0x400 ? float_bits(subnormal) : float_bits(normal);
  return float_of(((bits & 0x8000) << 16) | chosen);
}

// Rounds to the nearest, ties to even; a NaN becomes PyTorch's.
template <class T>
FEDSPA_INLINE T from_float(float value);

template <>
FEDSPA_INLINE float from_float<float>(float value) {
  return value;
}

template <>
FEDSPA_INLINE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded)};
}

// The sum with a power of two, chosen so that ten bits of the value's significand stay, rounds it;
// the two products before it make infinity of what is too large.
template <>
FEDSPA_INLINE Half from_float<Half>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t without_sign = bits << 1;
  const float magnitude = (float_of(bits & 0x7fffffff) * 0x1p112f) * 0x1p-110f;
  const uint32_t exponent = without_sign & 0xff000000;
  const uint32_t at_least = exponent < 0x71000000 ? 0x71000000 : exponent;
  const uint32_t sum = float_bits(float_of((at_least >> 1) + 0x07800000) + magnitude);
  const uint32_t rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  const uint32_t chosen = without_sign > 0xff000000 ? 0x7e00 : rounded;
  return {static_cast<uint16_t>(((bits >> 16) & 0x8000) | chosen)};
}

} // namespace fedspa
