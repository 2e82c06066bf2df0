// Large outputs on the CPU, on large pages.
//
// glibc maps what is larger than 32 MiB anew every time, and the system clears its pages one by one
// as they are first written: in 4 KiB pages that takes longer than to compute what goes in.

#pragma once

#include <tensors.h>

#include <cstdint>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fedspa {

inline void advise_large_pages([[maybe_unused]] const Tensor& output) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t ALWAYS_MAPPED = 32 << 20;
  constexpr uintptr_t LARGE_PAGE = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(output.const_data_ptr());
  const auto bytes = static_cast<uintptr_t>(output.numel()) * output.element_size();
  if (bytes > ALWAYS_MAPPED) {
    const uintptr_t first = (begin + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const uintptr_t last = (begin + bytes) / LARGE_PAGE * LARGE_PAGE;
    // Only advice: where it is refused, the pages are small.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

// Uninitialised, like new_empty_like and new_empty.
inline Tensor new_output(const Tensor& like, ScalarType dtype) {
  Tensor output = new_empty_like(like, dtype);
  advise_large_pages(output);
  return output;
}

inline Tensor new_output(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType dtype) {
  Tensor output = new_empty(like, sizes, dtype);
  advise_large_pages(output);
  return output;
}

} // namespace fedspa
