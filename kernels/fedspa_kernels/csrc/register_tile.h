// The innermost product of the CPU kernels that multiply matrices: a tile of sums in registers.

#pragma once

#include <cpu.h>

#include <cstring>

namespace fedspa {

// The right side is packed as strips of so many columns, one row after the other.
constexpr int64_t STRIP = 32;

// With AVX-512 the sums of 8 rows of two wide vectors fill the registers, with AVX2 those of 4 rows
// of two narrow ones.
typedef float Wide __attribute__((vector_size(64)));
typedef float Narrow __attribute__((vector_size(32)));

// sums[ROWS][two vectors] = sum over k of left[row][k] * right[k], where left[row][k] lies at
// row * left_stride + k * left_step.
template <class Vector, int64_t ROWS>
FEDSPA_INLINE void multiply_tile(const float* left, int64_t left_stride, int64_t left_step,
                                 const float* right, int64_t depth, float* sums) {
  Vector in_registers[ROWS][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector first, second;
    std::memcpy(&first, right + k * STRIP, sizeof(Vector));
    std::memcpy(&second, right + k * STRIP + sizeof(Vector) / sizeof(float), sizeof(Vector));
#pragma GCC unroll 8
    for (int64_t row = 0; row < ROWS; ++row) {
      in_registers[row][0] += left[row * left_stride + k * left_step] * first;
      in_registers[row][1] += left[row * left_stride + k * left_step] * second;
    }
  }
  std::memcpy(sums, in_registers, sizeof(in_registers));
}

} // namespace fedspa
