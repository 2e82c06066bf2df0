// wanda_scores and wanda_prune on the CPU; kernel.py says what they compute. The selection is
// csrc/groups.h.

#include <cpu.h>
#include <groups.h>
#include <order.h>
#include <pages.h>
#include <tensors.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

namespace {

using namespace fedspa;

// A norm is neither negative nor infinite nor NaN.
bool is_refused(const float* norms, int64_t n) {
  return std::any_of(norms, norms + n, [](float norm) {
    const int32_t key = order_key(float_bits(norm));
    return key < 0 || key >= INFINITY_KEY;
  });
}

// Calls run(at, row, col, size) for the parts of the entries begin to begin + size in one row each.
template <class Run>
FEDSPA_INLINE void for_each_row(int64_t begin, int64_t size, int64_t cols, const Run& run) {
  int64_t row = begin / cols;
  int64_t col = begin % cols;
  for (int64_t at = 0; at < size; ++row, col = 0) {
    const int64_t part = std::min(size - at, cols - col);
    run(at, row, col, part);
    at += part;
  }
}

FEDSPA_INLINE float kept_or_zero(float value, bool kept) {
  return kept ? value : 0.0f;
}

// A choice between structures would not be vectorised.
template <class T>
FEDSPA_INLINE T kept_or_zero(T value, bool kept) {
  return {static_cast<uint16_t>(kept ? value.bits : 0)};
}

template <class T>
struct Weights {
  const T* weight;
  const float* norms;
  bool norms_of_rows;
  int64_t cols;
  T* pruned;
  bool* mask;

  FEDSPA_BODY bool load(int64_t begin, int64_t size, int32_t* keys) const {
    int32_t wrong = 0;
    for_each_row(begin, size, cols,
                 [&](int64_t at, int64_t row, int64_t col, int64_t part) FEDSPA_BODY {
                   const T* in = weight + begin + at;
                   wrong |= norms_of_rows ? load_row(in, part, keys + at, norms[row])
                                          : load_row(in, part, keys + at, norms + col);
                 });
    return wrong != 0;
  }

  FEDSPA_BODY void store(int64_t begin, int64_t size, const int32_t* keys, int32_t last) const {
    const T* in = weight + begin;
    T* out = pruned + begin;
    bool* kept = mask + begin;
    for (int64_t i = 0; i < size; ++i) {
      out[i] = kept_or_zero(in[i], keys[i] > last);
      kept[i] = keys[i] > last;
    }
  }

 private:
  static FEDSPA_INLINE float at(float norm, int64_t) { return norm; }
  static FEDSPA_INLINE float at(const float* norms, int64_t i) { return norms[i]; }

  // Scores are not negative: without the sign, which a norm of -0.0 has, their bits are keys.
  template <class Norms>
  static FEDSPA_INLINE int32_t load_row(const T* in, int64_t size, int32_t* keys, Norms norms) {
    int32_t wrong = 0;
    for (int64_t i = 0; i < size; ++i) {
      const float value = to_float(in[i]);
      keys[i] = static_cast<int32_t>(float_bits(value * at(norms, i)) & 0x7fffffff);
      wrong |= !is_finite(value);
    }
    return wrong;
  }
};

std::tuple<Tensor, Tensor> wanda_scores(const Tensor& weight, const Tensor& norms,
                                        int64_t /*stream*/) {
  check_contiguous("wanda_scores: weight", weight, weight.scalar_type());
  check_contiguous("wanda_scores: norms", norms, ScalarType::Float);
  STD_TORCH_CHECK(weight.dim() == 2, "wanda_scores: weight: needs (rows, cols)");
  const int64_t cols = weight.size(1);
  check_sizes("wanda_scores: norms", norms, {cols});
  Tensor scores = new_output(weight, ScalarType::Float);
  Tensor invalid = new_flag(weight);
  *mutable_data<int32_t>(invalid) = is_refused(data<float>(norms), cols);
  for_weight_dtype("wanda_scores: weight", weight, [&]<class T>() {
    for_ranges(weight.numel(), ENTRIES_PER_TASK,
               [cols, in = data<T>(weight), norms = data<float>(norms),
                out = mutable_data<float>(scores)](int64_t begin, int64_t end) FEDSPA_BODY {
                 for_each_row(begin, end - begin, cols,
                              [=](int64_t at, int64_t, int64_t col, int64_t part) FEDSPA_BODY {
                                for (int64_t i = 0; i < part; ++i) {
                                  out[begin + at + i] =
                                      std::fabs(to_float(in[begin + at + i])) * norms[col + i];
                                }
                              });
               });
  });
  return {scores, invalid};
}

std::tuple<Tensor, Tensor, Tensor> wanda_prune(const Tensor& weight, const Tensor& norms,
                                               bool norms_of_rows, int64_t of, int64_t count,
                                               int64_t /*stream*/) {
  check_contiguous("wanda_prune: weight", weight, weight.scalar_type());
  check_contiguous("wanda_prune: norms", norms, ScalarType::Float);
  STD_TORCH_CHECK(weight.dim() == 2, "wanda_prune: weight: needs (rows, cols)");
  check_sizes("wanda_prune: norms", norms, {weight.size(norms_of_rows ? 0 : 1)});
  check_groups("wanda_prune", weight, of, count);
  Tensor pruned = new_output(weight, weight.scalar_type());
  Tensor mask = new_output(weight, ScalarType::Bool);
  Tensor invalid = new_flag(weight);
  for_weight_dtype("wanda_prune: weight", weight, [&]<class T>() {
    const Weights<T> entries{data<T>(weight), data<float>(norms),      norms_of_rows,
                             weight.size(1),  mutable_data<T>(pruned), mutable_data<bool>(mask)};
    const bool refused = select_in_groups<int32_t>(weight.numel(), of, count, entries);
    *mutable_data<int32_t>(invalid) = refused || is_refused(entries.norms, norms.numel());
  });
  return {pruned, mask, invalid};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("wanda_scores", TORCH_BOX(&wanda_scores));
  m.impl("wanda_prune", TORCH_BOX(&wanda_prune));
}
