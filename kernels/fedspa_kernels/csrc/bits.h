// Masks as bits, little bit order, and the kept values that stand beside them, on the CPU.

#pragma once

#include <cpu.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fedspa {

static_assert(std::endian::native == std::endian::little,
              "element i of a word must be its i-th lowest byte");

constexpr uint64_t LOW_BIT_OF_EACH_BYTE = 0x0101010101010101;

// A bool may be any byte but 0 where the tensor is a view of bytes, so that each becomes its own 0
// or 1 first. The product moves byte i from bit 8i to bit 56 + i; all 64 partial products land on
// different bits, so nothing carries into the top byte.
FEDSPA_INLINE uint8_t pack_word(uint64_t bools) {
  constexpr uint64_t BELOW_TOP = 0x7f7f7f7f7f7f7f7f;
  const uint64_t top_bits = ((bools & BELOW_TOP) + BELOW_TOP) | bools;
  const uint64_t ones = (top_bits >> 7) & LOW_BIT_OF_EACH_BYTE;
  return static_cast<uint8_t>((ones * 0x0102040810204080) >> 56);
}

// Every byte gets a copy of `bits` and keeps bit i of it, which is 0 or 2^i. Adding 127 raises the
// top bit of exactly the bytes that are not 0 (2^i + 127 <= 255: no carry), and the shift makes
// that top bit a bool.
FEDSPA_INLINE uint64_t unpack_word(uint8_t bits) {
  const uint64_t one_bit_each = (bits * LOW_BIT_OF_EACH_BYTE) & 0x8040201008040201;
  return ((one_bit_each + 0x7f7f7f7f7f7f7f7f) >> 7) & LOW_BIT_OF_EACH_BYTE;
}

// bools[0 .. n) = the bits of ceil(n / 8) bytes.
FEDSPA_INLINE void unpack_bits(const uint8_t* bits, int64_t n, uint8_t* bools) {
  for (int64_t byte = 0; byte < n / 8; ++byte) {
    const uint64_t word = unpack_word(bits[byte]);
    std::memcpy(bools + byte * 8, &word, 8);
  }
  if (n % 8 != 0) {
    const uint64_t word = unpack_word(bits[n / 8]);
    std::memcpy(bools + n / 8 * 8, &word, n % 8);
  }
}

FEDSPA_INLINE int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0;
  int64_t byte = 0;
  for (; byte + 8 <= bytes; byte += 8) {
    uint64_t word;
    std::memcpy(&word, bits + byte, 8);
    count += std::popcount(word);
  }
  for (; byte < bytes; ++byte) {
    count += std::popcount(bits[byte]);
  }
  return count;
}

// The values of one run of elements: from `next` up to `end`, which is never passed, whatever the
// bits say.
template <class T>
struct Run {
  T* next;
  T* end;
};

// The run of a segment: offsets holds, per segment, where its values begin among all `kept`.
template <class T>
Run<T> run_of(T* values, int64_t kept, const int64_t* offsets, int64_t segment, int64_t segments) {
  const int64_t begin = std::clamp<int64_t>(offsets[segment], 0, kept);
  const int64_t end = segment + 1 < segments ? offsets[segment + 1] : kept;
  return {values + begin, values + std::clamp<int64_t>(end, begin, kept)};
}

FEDSPA_INLINE bool bit_at(const uint8_t* bits, int64_t i) {
  return bits[i / 8] >> (i % 8) & 1;
}

// The generic forms: a bit advances the run without a branch, which random bits would mispredict.

template <class T>
void expand_each(const uint8_t* bits, int64_t i, int64_t n, Run<const T>& run, T* weight) {
  for (; i < n && run.next < run.end; ++i) {
    const bool kept = bit_at(bits, i);
    const T value = *run.next;
    weight[i] = kept ? value : T{};
    run.next += kept;
  }
  std::fill(weight + i, weight + std::max(i, n), T{});
}

template <class T>
void compress_each(const uint8_t* bits, int64_t i, int64_t n, const T* weight, Run<T>& run) {
  for (; i < n && run.next < run.end; ++i) {
    *run.next = weight[i];
    run.next += bit_at(bits, i);
  }
}

#if defined(__x86_64__)

// AVX-512 has both as single instructions, on 32 and 64 bits; 16 bits travel as 32.

#define FEDSPA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,bmi,bmi2,popcnt")))

template <class T>
constexpr int64_t LANES = sizeof(T) == 8 ? 8 : 16;

// Conversions take a mask they do not need, because GCC 12 warns of those without.
constexpr __mmask16 ALL_LANES = 0xffff;

template <class T>
FEDSPA_AVX512 FEDSPA_INLINE __m512i load_lanes(const T* from, uint32_t lanes) {
  if constexpr (sizeof(T) == 8) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes), from);
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), from);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), from);
    return _mm512_maskz_cvtepu16_epi32(ALL_LANES, halves);
  }
}

template <class T>
FEDSPA_AVX512 FEDSPA_INLINE void store_lanes(T* to, const __m512i& vector) {
  if constexpr (sizeof(T) == 2) {
    const __m256i halves = _mm512_maskz_cvtepi32_epi16(ALL_LANES, vector);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  } else {
    _mm512_storeu_si512(to, vector);
  }
}

template <class T>
FEDSPA_AVX512 FEDSPA_INLINE uint32_t lane_bits(const uint8_t* bits, int64_t i) {
  uint16_t pair = bits[i / 8];
  if constexpr (LANES<T> == 16) {
    std::memcpy(&pair, bits + i / 8, 2);
  }
  return pair;
}

template <class T>
FEDSPA_AVX512 int64_t expand_lanes(const uint8_t* bits, int64_t n, Run<const T>& run, T* weight) {
  const T* next = run.next;
  int64_t i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) {
    const uint32_t kept = lane_bits<T>(bits, i);
    const int64_t left = run.end - next;
    const __m512i values = load_lanes(next, left >= LANES<T> ? ALL_LANES : (1u << left) - 1);
    if constexpr (sizeof(T) == 8) {
      store_lanes(weight + i, _mm512_maskz_expand_epi64(static_cast<__mmask8>(kept), values));
    } else {
      store_lanes(weight + i, _mm512_maskz_expand_epi32(static_cast<__mmask16>(kept), values));
    }
    next += std::min<int64_t>(std::popcount(kept), left);
  }
  run.next = next;
  return i;
}

template <class T>
FEDSPA_AVX512 FEDSPA_INLINE __m512 load_floats(const T* from, uint32_t lanes) {
  if constexpr (std::is_same_v<T, Half>) {
    const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), from);
    return _mm512_maskz_cvtph_ps(ALL_LANES, halves);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(ALL_LANES, load_lanes(from, lanes), 16));
  } else {
    return _mm512_castsi512_ps(load_lanes(from, lanes));
  }
}

// As expand_lanes, without a store of the weights: sums += weight, votes += bit.
template <class T>
FEDSPA_AVX512 int64_t add_lanes(const uint8_t* bits, int64_t n, Run<const T>& run, float* sums,
                                int32_t* votes) {
  const __m512i one = _mm512_set1_epi32(1);
  const T* next = run.next;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const auto kept = static_cast<__mmask16>(lane_bits<T>(bits, i));
    const int64_t left = run.end - next;
    const __m512 values = load_floats(next, left >= 16 ? ALL_LANES : (1u << left) - 1);
    const __m512 sum = _mm512_loadu_ps(sums + i);
    _mm512_storeu_ps(sums + i, sum + _mm512_maskz_expand_ps(kept, values));
    const __m512i vote = _mm512_loadu_si512(votes + i);
    _mm512_storeu_si512(votes + i, _mm512_mask_add_epi32(vote, kept, vote, one));
    next += std::min<int64_t>(std::popcount(static_cast<uint32_t>(kept)), left);
  }
  run.next = next;
  return i;
}

// Stores whole vectors, whose spare lanes the next ones overwrite, as long as they fit in the run.
template <class T>
FEDSPA_AVX512 int64_t compress_lanes(const uint8_t* bits, int64_t n, const T* weight, Run<T>& run) {
  T* next = run.next;
  int64_t i = 0;
  for (; i + LANES<T> <= n && run.end - next >= LANES<T>; i += LANES<T>) {
    const uint32_t kept = lane_bits<T>(bits, i);
    const __m512i values = load_lanes(weight + i, ALL_LANES);
    if constexpr (sizeof(T) == 8) {
      store_lanes(next, _mm512_maskz_compress_epi64(static_cast<__mmask8>(kept), values));
    } else {
      store_lanes(next, _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept), values));
    }
    next += std::popcount(kept);
  }
  run.next = next;
  return i;
}

#endif

// weight[0 .. n) = the next value of the run where a bit is set, 0 elsewhere. The run advances.
template <class T>
void expand(const uint8_t* bits, int64_t n, Run<const T>& run, T* weight) {
  int64_t done = 0;
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::AVX512) {
    done = expand_lanes(bits, n, run, weight);
  }
#endif
  expand_each(bits, done, n, run, weight);
}

// The run = the weights whose bit is set.
template <class T>
void compress(const uint8_t* bits, int64_t n, const T* weight, Run<T> run) {
  int64_t done = 0;
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::AVX512) {
    done = compress_lanes(bits, n, weight, run);
  }
#endif
  compress_each(bits, done, n, weight, run);
}

} // namespace fedspa
