// multiply_ on the CPU: out = plus + sign * left * right, for the products around a sweep.
//
// left (N, M, K), out and plus (N, M, C) float32, contiguous along the last axis; plus may be out,
// or absent; right (N, K, C) float32, contiguous along one of its last two axes. `triangle` says
// which part of right is not zero: 1 the upper, -1 the lower, 0 all.
//
// The right side is packed as strips of columns, which threads share; the left one is read as it
// lies. Each entry is summed by one thread, in the same order whatever the threads. The libraries
// that PyTorch multiplies with do not use AVX-512 on all processors that have it.

#include <cpu.h>
#include <register_tile.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <optional>

namespace {

using namespace fedspa;

// A packed block of so many rows and columns stays in the second cache while rows of the left side
// pass by.
constexpr int64_t DEPTH = 512;
constexpr int64_t WIDTH = 256;
// Rows that a task takes together, and multiply-adds that are worth a thread of their own.
constexpr int64_t ROWS_PER_TASK = 32;
constexpr int64_t PRODUCTS_PER_TASK = 1 << 19;
constexpr int64_t NUMBERS_PER_TASK = 1 << 15;

struct Product {
  const float* left;
  int64_t left_stride;
  const float* right;
  int64_t right_stride;
  int64_t right_step;
  const float* plus;
  int64_t plus_stride;
  float* out;
  int64_t out_stride;
  int64_t rows;
  int64_t depth;
  int64_t cols;
  float sign;
  int64_t triangle;
  float* packed;

  int64_t strips() const { return (cols + STRIP - 1) / STRIP; }

  // Of a strip the first and the last row of the right side that is not all zero.
  FEDSPA_INLINE int64_t first_row(int64_t strip) const {
    return triangle < 0 ? std::min(strip * STRIP, depth) : 0;
  }
  FEDSPA_INLINE int64_t last_row(int64_t strip) const {
    return triangle > 0 ? std::min((strip + 1) * STRIP, depth) : depth;
  }
};

// packed[(strip * depth + k) * STRIP + i] = right[k][strip * STRIP + i], or 0 beyond the last.
void pack(const Product& product) {
  const int64_t grain = std::max<int64_t>(1, NUMBERS_PER_TASK / (product.depth * STRIP + 1));
  for_ranges(product.strips(), grain, [p = product](int64_t begin, int64_t end) FEDSPA_BODY {
    for (int64_t strip = begin; strip < end; ++strip) {
      const float* from = p.right + strip * STRIP * p.right_step;
      float* to = p.packed + strip * p.depth * STRIP;
      const int64_t size = std::min(STRIP, p.cols - strip * STRIP);
      for (int64_t k = p.first_row(strip); k < p.last_row(strip); ++k) {
        for (int64_t i = 0; i < size; ++i) {
          to[k * STRIP + i] = from[k * p.right_stride + i * p.right_step];
        }
        std::fill(to + k * STRIP + size, to + (k + 1) * STRIP, 0.0f);
      }
    }
  });
}

// One tile of the result: of `rows` rows from `row` on, in the columns of a strip from `col` on.
template <class Vector, int64_t ROWS>
FEDSPA_INLINE void add_tile(const Product& p, int64_t row, int64_t rows, int64_t strip, int64_t col,
                            int64_t begin, int64_t end, bool first) {
  constexpr int64_t COLS = 2 * sizeof(Vector) / sizeof(float);
  const float* left = p.left + row * p.left_stride + begin;
  const float* right = p.packed + (strip * p.depth + begin) * STRIP + col;
  float sums[ROWS * COLS];
  if (rows == ROWS) {
    multiply_tile<Vector, ROWS>(left, p.left_stride, 1, right, end - begin, sums);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      multiply_tile<Vector, 1>(left + r * p.left_stride, 0, 1, right, end - begin, sums + r * COLS);
    }
  }
  const int64_t at = strip * STRIP + col;
  const int64_t size = std::min(COLS, p.cols - at);
  const float* plus = first ? p.plus : p.out;
  const int64_t plus_stride = first ? p.plus_stride : p.out_stride;
  for (int64_t r = 0; r < rows; ++r) {
    float* out = p.out + (row + r) * p.out_stride + at;
    if (plus == nullptr) {
      for (int64_t i = 0; i < size; ++i) {
        out[i] = p.sign * sums[r * COLS + i];
      }
    } else {
      const float* before = plus + (row + r) * plus_stride + at;
      for (int64_t i = 0; i < size; ++i) {
        out[i] = before[i] + p.sign * sums[r * COLS + i];
      }
    }
  }
}

template <class Vector, int64_t ROWS>
FEDSPA_INLINE void multiply_rows(const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t COLS = 2 * sizeof(Vector) / sizeof(float);
  for (int64_t wide = 0; wide < p.cols; wide += WIDTH) {
    const int64_t last_strip = (std::min(wide + WIDTH, p.cols) + STRIP - 1) / STRIP;
    // An empty sum is zero, and is stored too.
    for (int64_t deep = 0; deep == 0 || deep < p.depth; deep += DEPTH) {
      for (int64_t row = begin; row < end; row += ROWS) {
        const int64_t rows = std::min(ROWS, end - row);
        for (int64_t strip = wide / STRIP; strip < last_strip; ++strip) {
          const int64_t from = std::max(deep, p.first_row(strip));
          const int64_t to = std::min(deep + DEPTH, p.last_row(strip));
          // Of a triangle some blocks are empty; the first is not skipped, since it starts the sum.
          if (from < to || deep == 0) {
            for (int64_t col = 0; col < STRIP && strip * STRIP + col < p.cols; col += COLS) {
              add_tile<Vector, ROWS>(p, row, rows, strip, col, std::min(from, to), to, deep == 0);
            }
          }
        }
      }
    }
  }
}

void multiply(const Product& product) {
  pack(product);
  const int64_t tasks = (product.rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  const int64_t products = ROWS_PER_TASK * std::max<int64_t>(1, product.depth * product.cols);
  const int64_t grain = std::max<int64_t>(1, PRODUCTS_PER_TASK / products);
  for_ranges(tasks, grain, [p = product](int64_t begin, int64_t end) FEDSPA_BODY {
    const int64_t last = std::min(end * ROWS_PER_TASK, p.rows);
    if (instruction_set() == InstructionSet::AVX512) {
      multiply_rows<Wide, 8>(p, begin * ROWS_PER_TASK, last);
    } else {
      multiply_rows<Narrow, 4>(p, begin * ROWS_PER_TASK, last);
    }
  });
}

void check_matrices(const Tensor& matrices, std::initializer_list<int64_t> sizes) {
  check_dtype("multiply_", matrices, ScalarType::Float);
  check_sizes("multiply_", matrices, sizes);
}

void check_rows(const Tensor& matrices, std::initializer_list<int64_t> sizes) {
  check_matrices(matrices, sizes);
  STD_TORCH_CHECK(matrices.stride(2) == 1 || matrices.size(2) == 1,
                  "multiply_: needs contiguous rows");
}

void multiply_(Tensor out, const Tensor& left, const Tensor& right, std::optional<Tensor> plus,
               bool subtract, int64_t triangle, int64_t) {
  STD_TORCH_CHECK(left.dim() == 3 && right.dim() == 3, "multiply_: needs stacks of matrices");
  const int64_t matrices = left.size(0);
  const int64_t rows = left.size(1);
  const int64_t depth = left.size(2);
  const int64_t cols = right.size(2);
  check_rows(left, {matrices, rows, depth});
  check_rows(out, {matrices, rows, cols});
  check_matrices(right, {matrices, depth, cols});
  if (plus) {
    check_rows(*plus, {matrices, rows, cols});
  }
  const int64_t strips = (cols + STRIP - 1) / STRIP;
  const auto packed = std::make_unique_for_overwrite<float[]>(strips * STRIP * depth + STRIP);
  // From a cache line's beginning: a vector that lies in two of them takes two loads.
  const auto address = (reinterpret_cast<uintptr_t>(packed.get()) + 63) / 64 * 64;
  for (int64_t n = 0; n < matrices; ++n) {
    multiply({data<float>(left) + n * left.stride(0), left.stride(1),
              data<float>(right) + n * right.stride(0), right.stride(1), right.stride(2),
              plus ? data<float>(*plus) + n * plus->stride(0) : nullptr, plus ? plus->stride(1) : 0,
              mutable_data<float>(out) + n * out.stride(0), out.stride(1), rows, depth, cols,
              subtract ? -1.0f : 1.0f, triangle, reinterpret_cast<float*>(address)});
  }
}

} // namespace

// Not among the schemas of all devices: a GPU's library multiplies.
STABLE_TORCH_LIBRARY_FRAGMENT(fedspa_native, m) {
  m.def(
      "multiply_(Tensor(a!) out, Tensor left, Tensor right, Tensor? plus, bool subtract, "
      "int triangle, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("multiply_", TORCH_BOX(&multiply_));
}
