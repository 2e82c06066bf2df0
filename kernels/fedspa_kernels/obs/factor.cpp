// factor_block_ on the CPU: Cholesky and inverse of one small block on the diagonal.
//
// block (N, W, W), a view with contiguous rows whose upper triangle is read, W <= WIDEST, of which
// H~ = block + damp is the last diagonal block that is not factored yet; damp (N,), dead (N, W),
// failed (N,) int32; upper and inverse (N, W, W), views with contiguous rows, are filled:
// H~ = L L^T and L^-1, both upper triangular, with zeros below.

#include <cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

using namespace fedspa;

constexpr int64_t WIDEST = 128;
constexpr int64_t LANES = 16;
constexpr int64_t TOGETHER = 4;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

// An odd number of cache lines a row, so that a column does not meet itself in the cache.
typedef float Square[WIDEST][WIDEST + LANES];

FEDSPA_INLINE void load(Vector& vector, const float* from) {
  std::memcpy(&vector, from, sizeof(Vector));
}

// row[first .. last) -= sum over begin <= l < end of factors[l] * rows[l][first .. last), in whole
// vectors: what is beyond the last column of a triangle is zero, or is not looked at.
FEDSPA_INLINE void subtract_rows(float* row, const float* factors, const Square& rows,
                                 int64_t begin, int64_t end, int64_t first, int64_t last) {
  int64_t col = first / LANES * LANES;
  for (; col + (TOGETHER - 1) * LANES < last; col += TOGETHER * LANES) {
    Vector sums[TOGETHER];
#pragma GCC unroll 4
    for (int64_t i = 0; i < TOGETHER; ++i) {
      load(sums[i], row + col + i * LANES);
    }
    for (int64_t l = begin; l < end; ++l) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < TOGETHER; ++i) {
        Vector entries;
        load(entries, rows[l] + col + i * LANES);
        sums[i] -= factors[l] * entries;
      }
    }
    std::memcpy(row + col, sums, sizeof(sums));
  }
  for (; col < last; col += LANES) {
    Vector sum, entries;
    load(sum, row + col);
    for (int64_t l = begin; l < end; ++l) {
      load(entries, rows[l] + col);
      sum -= factors[l] * entries;
    }
    std::memcpy(row + col, &sum, sizeof(Vector));
  }
}

struct alignas(64) Triangles {
  Square upper;
  Square inverse;
};

// From the last column to the first: L_k = H~_k / L_kk, and what is left of it is H~ - L_k * L_k^T.
// False where a pivot is not positive.
FEDSPA_INLINE bool factor(Square& upper, int64_t size) {
  bool positive = true;
  for (int64_t k = size - 1; k >= 0; --k) {
    positive &= upper[k][k] > 0;
    upper[k][k] = std::sqrt(upper[k][k]);
    const float reciprocal = 1 / upper[k][k];
    // With zeros from k on, so that whole vectors of it can be subtracted.
    alignas(64) float column[WIDEST] = {};
    for (int64_t row = 0; row < k; ++row) {
      column[row] = upper[row][k] *= reciprocal;
    }
    for (int64_t row = 0; row < k; ++row) {
      float* left = upper[row];
      const float factor = column[row];
      for (int64_t col = row / LANES * LANES; col < k; col += LANES) {
        Vector rest, entries;
        load(rest, left + col);
        load(entries, column + col);
        rest -= factor * entries;
        std::memcpy(left + col, &rest, sizeof(Vector));
      }
    }
  }
  return positive;
}

// From the last row to the first, R_k = (I_k - sum over l > k of L_kl * R_l) / L_kk.
FEDSPA_INLINE void invert(Triangles& block, int64_t size) {
  for (int64_t k = size - 1; k >= 0; --k) {
    float* row = block.inverse[k];
    std::fill_n(row, WIDEST, 0.0f);
    row[k] = 1;
    subtract_rows(row, block.upper[k], block.inverse, k + 1, size, k, size);
    const float reciprocal = 1 / block.upper[k][k];
    for (int64_t col = k; col < size; ++col) {
      row[col] *= reciprocal;
    }
  }
}

// A matrix of a view whose rows are contiguous.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
};

struct Block {
  Rows<const float> block;
  float damp;
  const uint8_t* dead;
  Rows<float> upper;
  Rows<float> inverse;
  int32_t* failed;
};

FEDSPA_INLINE void store(const Square& square, Rows<float> to, int64_t size) {
  for (int64_t row = 0; row < size; ++row) {
    float* first = to.first + row * to.stride;
    std::fill_n(first, row, 0.0f);
    std::copy(square[row] + row, square[row] + size, first + row);
  }
}

FEDSPA_INLINE void factor_block(const Block& of, int64_t size) {
  Triangles block;
  for (int64_t row = 0; row < size; ++row) {
    const float* first = of.block.first + row * of.block.stride;
    std::fill_n(block.upper[row], WIDEST, 0.0f);
    std::copy(first + row, first + size, block.upper[row] + row);
    float& pivot = block.upper[row][row];
    pivot += of.damp;
    pivot = of.dead[row] != 0 && pivot == 0 ? 1 : pivot;
  }
  if (!factor(block.upper, size)) {
    *of.failed = 1;
  }
  invert(block, size);
  store(block.upper, of.upper, size);
  store(block.inverse, of.inverse, size);
}

void check_squares(const Tensor& squares, int64_t matrices, int64_t size) {
  check_dtype("factor_block_", squares, ScalarType::Float);
  check_sizes("factor_block_", squares, {matrices, size, size});
  STD_TORCH_CHECK(squares.stride(2) == 1 || size == 1, "factor_block_: needs contiguous rows");
}

void factor_block_(const Tensor& block, const Tensor& damp, const Tensor& dead, Tensor upper,
                   Tensor inverse, Tensor failed, int64_t) {
  STD_TORCH_CHECK(block.dim() == 3 && block.size(2) <= WIDEST, "factor_block_: needs at most ",
                  WIDEST, " columns, in three dimensions");
  const int64_t matrices = block.size(0);
  const int64_t size = block.size(2);
  for (const Tensor& squares : {block, upper, inverse}) {
    check_squares(squares, matrices, size);
  }
  check_contiguous("factor_block_", damp, ScalarType::Float);
  check_sizes("factor_block_", damp, {matrices});
  check_dtype("factor_block_", dead, ScalarType::Bool);
  check_sizes("factor_block_", dead, {matrices, size});
  STD_TORCH_CHECK(dead.stride(1) == 1 || size == 1, "factor_block_: needs contiguous rows");
  check_contiguous("factor_block_", failed, ScalarType::Int);
  check_sizes("factor_block_", failed, {matrices});
  const auto rows_of = [](const Tensor& squares, int64_t matrix) {
    return Rows<float>{mutable_data<float>(squares) + matrix * squares.stride(0),
                       squares.stride(1)};
  };
  std::vector<Block> blocks;
  for (int64_t n = 0; n < matrices; ++n) {
    blocks.push_back({{data<float>(block) + n * block.stride(0), block.stride(1)},
                      data<float>(damp)[n],
                      data<uint8_t>(dead) + n * dead.stride(0),
                      rows_of(upper, n),
                      rows_of(inverse, n),
                      mutable_data<int32_t>(failed) + n});
  }
  for_ranges(matrices, 1, [size, blocks = blocks.data()](int64_t begin, int64_t end) FEDSPA_BODY {
    for (int64_t n = begin; n < end; ++n) {
      factor_block(blocks[n], size);
    }
  });
}

} // namespace

// Not among the schemas of all devices: a GPU's library factors the whole.
STABLE_TORCH_LIBRARY_FRAGMENT(fedspa_native, m) {
  m.def(
      "factor_block_(Tensor block, Tensor damp, Tensor dead, Tensor(a!) upper, Tensor(b!) inverse, "
      "Tensor(c!) failed, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("factor_block_", TORCH_BOX(&factor_block_));
}
