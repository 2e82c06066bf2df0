// The words of CUDA that kernels use, and no others: what is not here does not compile.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "execution.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// Bits and numbers.

inline int __popc(unsigned value) {
  return std::popcount(value);
}
inline int __popcll(unsigned long long value) {
  return std::popcount(value);
}
inline int __clz(int value) {
  return std::countl_zero(static_cast<unsigned>(value));
}
inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}

// Not inlined: the compiler may fuse a product with a sum elsewhere, as nvcc does, and never here.
#define SHIM_ROUNDED __attribute__((noinline)) inline
SHIM_ROUNDED float __fmul_rn(float left, float right) {
  return left * right;
}
SHIM_ROUNDED float __fadd_rn(float left, float right) {
  return left + right;
}
SHIM_ROUNDED float __fdiv_rn(float left, float right) {
  return left / right;
}
#undef SHIM_ROUNDED

// Barriers and warp operations. The place in the source tells them apart.

namespace shim {

using Where = std::source_location;

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int lane, int width, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA does not shuffle this type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation({operation, mask, bits, lane, width}, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned vote(Operation operation, unsigned mask, uint64_t value, const Where& where) {
  return static_cast<unsigned>(warp_operation({operation, mask, value, 0, 32}, where));
}

} // namespace shim

inline void __syncthreads(const shim::Where& where = shim::Where::current()) {
  shim::barrier(where);
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       const shim::Where& where = shim::Where::current()) {
  shim::vote(shim::Operation::sync, mask, 0, where);
}
inline unsigned __ballot_sync(unsigned mask, int value,
                              const shim::Where& where = shim::Where::current()) {
  return shim::vote(shim::Operation::ballot, mask, value != 0, where);
}
inline int __any_sync(unsigned mask, int value, const shim::Where& where = shim::Where::current()) {
  return shim::vote(shim::Operation::any, mask, value != 0, where);
}
inline int __all_sync(unsigned mask, int value, const shim::Where& where = shim::Where::current()) {
  return shim::vote(shim::Operation::all, mask, value != 0, where);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          const shim::Where& where = shim::Where::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "CUDA does not match this type");
  return shim::vote(shim::Operation::match_any, mask, static_cast<uint64_t>(value), where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              const shim::Where& where = shim::Where::current()) {
  return shim::shuffle(shim::Operation::shuffle, mask, value, lane, width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 const shim::Where& where = shim::Where::current()) {
  return shim::shuffle(shim::Operation::shuffle_up, mask, value, distance, width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   const shim::Where& where = shim::Where::current()) {
  return shim::shuffle(shim::Operation::shuffle_down, mask, value, distance, width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  const shim::Where& where = shim::Where::current()) {
  return shim::shuffle(shim::Operation::shuffle_xor, mask, value, lanes, width, where);
}

// Atomics on integers alone: with those on floats the result would hang on the order.

template <class T>
concept AtomicInteger =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

template <AtomicInteger T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = max(old, value);
  return old;
}
template <AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = min(old, value);
  return old;
}

// The host's side.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
