// Neighbours in memory: moved together, and found in rows.

#pragma once

#include <device.cuh>

namespace fedspa {

// N neighbours in memory, moved with instructions of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Reads the first `valid` of N; aligned: all N are there, and they lie as a Pack does.
template <int N, class T>
__device__ void read(const T* from, int valid, bool aligned, T (&to)[N]) {
  if (aligned) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      to[j] = pack.at[j];
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    to[j] = j < valid ? from[j] : T{};
  }
}

template <int N, class T>
__device__ void write(T* to, int valid, bool aligned, const T (&from)[N]) {
  if (aligned) {
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      pack.at[j] = from[j];
    }
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < valid) {
      to[j] = from[j];
    }
  }
}

// Divides indices by a row's length. Those below 2^32 take a multiplication: a division of 64 bits
// would cost more than the load that it is for.
class Divisor {
 public:
  explicit Divisor(int64_t divisor)
      : divisor_(divisor), reciprocal_((uint64_t{1} << 32) / static_cast<uint64_t>(divisor)) {}

  __device__ int64_t quotient(int64_t index) const {
    if (index >> 32 != 0) {
      return index / divisor_;
    }
    // The reciprocal was rounded down, which makes the quotient smaller by at most one.
    const int64_t low = static_cast<int64_t>((static_cast<uint64_t>(index) * reciprocal_) >> 32);
    return low + (index - low * divisor_ >= divisor_);
  }

  __device__ int64_t divisor() const { return divisor_; }

 private:
  int64_t divisor_;
  uint64_t reciprocal_;
};

} // namespace fedspa
