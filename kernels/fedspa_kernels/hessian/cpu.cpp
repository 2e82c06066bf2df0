// add_products_ and mirror_upper_ on the CPU: hessian += inputs^T * inputs, in both triangles, and
// its second half alone.
//
// hessian (N, K, K) float32, contiguous; inputs (N, T, K) float32, float16 or bfloat16, contiguous
// along the last axis; or both without the first axis.
//
// The columns of the inputs are packed as strips, in float32, and each strip is multiplied with
// those up to it; what is below the diagonal is then the transpose of what is above. Every entry is
// summed by one thread, in the order of the tokens.

#include <cpu.h>
#include <register_tile.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace {

using namespace fedspa;

constexpr int64_t TILE = 64;

// So many tokens of a strip stay in the first cache while they meet another strip.
constexpr int64_t TOKENS = 256;

// So many packed numbers stay in the second cache.
constexpr int64_t PACKED = 1 << 18;

// Multiply-adds, and packed numbers, that are worth a thread of their own.
constexpr int64_t PRODUCTS_PER_TASK = 1 << 20;
constexpr int64_t NUMBERS_PER_TASK = 1 << 16;

// out[0 .. rows)[0 .. cols) += left^T * right, of two strips; `out` is a part of (k, k).
template <class Vector, int64_t ROWS>
FEDSPA_INLINE void add_strips(const float* left, const float* right, int64_t tokens, int64_t rows,
                              int64_t cols, int64_t k, float* out) {
  constexpr int64_t WIDTH = 2 * sizeof(Vector) / sizeof(float);
  for (int64_t col = 0; col < cols; col += WIDTH) {
    for (int64_t row = 0; row < rows; row += ROWS) {
      float sums[ROWS * WIDTH];
      multiply_tile<Vector, ROWS>(left + row, 1, STRIP, right + col, tokens, sums);
      for (int64_t r = 0; r < std::min(ROWS, rows - row); ++r) {
        float* to = out + (row + r) * k + col;
        for (int64_t c = 0; c < std::min(WIDTH, cols - col); ++c) {
          to[c] += sums[r * WIDTH + c];
        }
      }
    }
  }
}

// A block of up to `most` tokens, as strips: packed[(s * most + t) * STRIP + i] is token t's column
// s * STRIP + i, or 0 beyond the last.
struct Strips {
  float* packed;
  int64_t most;
  int64_t k;

  template <class T>
  void pack(const T* inputs, int64_t stride, int64_t tokens) const {
    const int64_t grain = std::max<int64_t>(1, NUMBERS_PER_TASK / k);
    for_ranges(tokens, grain, [=, strips = *this](int64_t begin, int64_t end) FEDSPA_BODY {
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t col = 0; col < strips.k; col += STRIP) {
          const T* in = inputs + token * stride + col;
          float* out = strips.packed + col * strips.most + token * STRIP;
          const int64_t size = std::min(STRIP, strips.k - col);
          for (int64_t i = 0; i < size; ++i) {
            out[i] = to_float(in[i]);
          }
          std::fill(out + size, out + STRIP, 0.0f);
        }
      }
    });
  }

  // Adds the products of all pairs of strips on and above the diagonal.
  void add_upper(int64_t tokens, float* matrix) const {
    const int64_t count = (k + STRIP - 1) / STRIP;
    const int64_t grain = std::max<int64_t>(1, PRODUCTS_PER_TASK / (tokens * STRIP * STRIP));
    const auto body = [=, strips = *this](int64_t begin, int64_t end) FEDSPA_BODY {
      int64_t right = 0;
      while ((right + 1) * (right + 2) / 2 <= begin) {
        ++right;
      }
      int64_t left = begin - right * (right + 1) / 2;
      for (int64_t pair = begin; pair < end; ++pair) {
        strips.add_pair(left * STRIP, right * STRIP, tokens, matrix);
        const bool last = left == right;
        left = last ? 0 : left + 1;
        right += last;
      }
    };
    for_ranges(count * (count + 1) / 2, grain, body);
  }

 private:
  FEDSPA_BODY void add_pair(int64_t row, int64_t col, int64_t tokens, float* matrix) const {
    float* out = matrix + row * k + col;
    const int64_t rows = std::min(STRIP, k - row);
    const int64_t cols = std::min(STRIP, k - col);
    for (int64_t first = 0; first < tokens; first += TOKENS) {
      const int64_t size = std::min(TOKENS, tokens - first);
      const float* left = packed + row * most + first * STRIP;
      const float* right = packed + col * most + first * STRIP;
      if (instruction_set() == InstructionSet::AVX512) {
        add_strips<Wide, 8>(left, right, size, rows, cols, k, out);
      } else {
        add_strips<Narrow, 4>(left, right, size, rows, cols, k, out);
      }
    }
  }
};

// The tile of rows from `row` and columns from `col` <= row, below the diagonal, from its mirror.
// It is read row by row into a buffer: the rows of a tile often lie a power of two apart, where a
// cache keeps only a few of them.
FEDSPA_INLINE void mirror_tile(float* hessian, int64_t k, int64_t row, int64_t col) {
  float tile[TILE][TILE];
  const int64_t rows = std::min(TILE, k - row);
  const int64_t cols = std::min(TILE, k - col);
  for (int64_t c = 0; c < cols; ++c) {
    std::copy_n(hessian + (col + c) * k + row, rows, tile[c]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t below = std::min(cols, row + r - col);
    for (int64_t c = 0; c < below; ++c) {
      hessian[(row + r) * k + col + c] = tile[c][r];
    }
  }
}

void mirror_upper(float* matrix, int64_t k) {
  const int64_t tiles = (k + TILE - 1) / TILE;
  // The first row of tiles and the last make one task, the second and the last but one, and so on:
  // each the same number of tiles.
  const int64_t grain = std::max<int64_t>(1, NUMBERS_PER_TASK / ((tiles + 1) * TILE * TILE));
  for_ranges((tiles + 1) / 2, grain, [=](int64_t begin, int64_t end) FEDSPA_BODY {
    for (int64_t first = begin; first < end; ++first) {
      const int64_t last = tiles - 1 - first;
      for (int64_t tile = 0; tile <= first; ++tile) {
        mirror_tile(matrix, k, first * TILE, tile * TILE);
      }
      for (int64_t tile = 0; tile <= last && last != first; ++tile) {
        mirror_tile(matrix, k, last * TILE, tile * TILE);
      }
    }
  });
}

// The lower triangle := the transpose of the upper one, for who brings products of their own.
void mirror_upper_(Tensor hessian, int64_t) {
  check_contiguous("mirror_upper_", hessian, ScalarType::Float);
  STD_TORCH_CHECK(hessian.dim() == 3 && hessian.size(1) == hessian.size(2),
                  "mirror_upper_: needs a hessian (N, K, K)");
  const int64_t k = hessian.size(1);
  for (int64_t n = 0; n < hessian.size(0); ++n) {
    mirror_upper(mutable_data<float>(hessian) + n * k * k, k);
  }
}

void add_products_(Tensor hessian, const Tensor& inputs, int64_t) {
  constexpr const char* NAME = "add_products_";
  check_contiguous(NAME, hessian, ScalarType::Float);
  const int64_t axes = inputs.dim();
  STD_TORCH_CHECK(axes == 2 || axes == 3, NAME, ": needs inputs (N, T, K) or (T, K)");
  const int64_t matrices = axes == 3 ? inputs.size(0) : 1;
  const int64_t tokens = inputs.size(axes - 2);
  const int64_t k = inputs.size(axes - 1);
  STD_TORCH_CHECK(inputs.stride(axes - 1) == 1 || k == 1, NAME,
                  ": needs inputs that are contiguous along the last axis");
  if (axes == 3) {
    check_sizes(NAME, hessian, {matrices, k, k});
  } else {
    check_sizes(NAME, hessian, {k, k});
  }
  if (tokens == 0 || hessian.numel() == 0) {
    return;
  }
  const int64_t stride = inputs.stride(axes - 2);
  const int64_t most = std::min(tokens, std::max<int64_t>(1, PACKED / k / TOKENS) * TOKENS);
  const int64_t numbers = (k + STRIP - 1) / STRIP * STRIP * most;
  // From a cache line's beginning: a vector that lies in two of them takes two loads.
  constexpr uintptr_t LINE = 64;
  const auto buffer = std::make_unique_for_overwrite<char[]>(numbers * sizeof(float) + LINE);
  const auto aligned = (reinterpret_cast<uintptr_t>(buffer.get()) + LINE - 1) / LINE * LINE;
  const Strips strips{reinterpret_cast<float*>(aligned), most, k};
  for_weight_dtype(NAME, inputs, [&]<class T>() {
    for (int64_t n = 0; n < matrices; ++n) {
      float* matrix = mutable_data<float>(hessian) + n * k * k;
      for (int64_t first = 0; first < tokens; first += most) {
        const T* in = data<T>(inputs) + n * inputs.stride(0) + first * stride;
        const int64_t size = std::min(most, tokens - first);
        strips.pack(in, stride, size);
        strips.add_upper(size, matrix);
      }
      mirror_upper(matrix, k);
    }
  });
}

} // namespace

// Not among the schemas of all devices: kernel.py takes CUDA's panels where this is not there, as
// where tests run CUDA's kernels on a CPU.
STABLE_TORCH_LIBRARY_FRAGMENT(fedspa_native, m) {
  m.def("add_products_(Tensor(a!) hessian, Tensor inputs, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("mirror_upper_", TORCH_BOX(&mirror_upper_));
  m.impl("add_products_", TORCH_BOX(&add_products_));
}
