// Threads over elements, and their loads.

#pragma once

#include <device.cuh>

#include <cstring>
#include <type_traits>

namespace fedspa {

// The number of this thread in the grid.
__device__ inline int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

inline unsigned blocks_for(const char* name, int64_t items, int64_t items_per_block) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, name, ": ", items, " are too many for one launch");
  return static_cast<unsigned>(blocks);
}

// The built-in type of T's size: what one load brings, and not taken apart before it is used.
template <class T>
struct WordOf {
  static constexpr size_t SIZE = sizeof(T);
  static_assert(SIZE == 1 || SIZE == 2 || SIZE == 4 || SIZE == 8 || SIZE == 16);
  using Small = std::conditional_t<SIZE == 1, uint8_t, uint16_t>;
  using Middle = std::conditional_t<SIZE <= 2, Small, unsigned>;
  using Large = std::conditional_t<SIZE == 16, uint4, uint2>;
  using Type = std::conditional_t<SIZE <= 4, Middle, Large>;
};

template <class T>
using Word = typename WordOf<T>::Type;

// Reads what no thread writes. A pointer that was itself read from memory could point anywhere, for
// all that the compiler knows; __ldg says that it is global memory.
template <class T>
__device__ Word<T> load_constant_word(const T* address) {
  return __ldg(reinterpret_cast<const Word<T>*>(address));
}

template <class T>
__device__ T from_word(const Word<T>& word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T>
__device__ T load_constant(const T* address) {
  return from_word<T>(load_constant_word(address));
}

} // namespace fedspa
