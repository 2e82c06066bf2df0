// l0 averaging on the GPU.
//
// l0_average             weights and masks of C clients          -> average, votes int32
// l0_average_compressed  bits, values and offsets of C clients   -> average, votes int32
// l0_add_                adds one client to total, votes and kept
//
// Sums are float32 in the clients' order. A value that is masked out may be NaN, so it is left out
// and not multiplied by 0.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "average.cuh"

namespace {

using namespace fedspa::l0;
using namespace fedspa;

constexpr int ADD_BLOCK = 256; // threads

// kept and mask may be nullptr.
template <class T>
struct Sums {
  float* total;
  int* votes;
  float* kept;
  const T* weight;
  const bool* mask;
  float importance;
};

template <int N, class T>
__device__ void add_at(const Sums<T>& sums, int64_t start) {
  auto* const total = reinterpret_cast<Pack<float, N>*>(sums.total + start);
  auto* const votes = reinterpret_cast<Pack<int, N>*>(sums.votes + start);
  const Pack<T, N> weight = *reinterpret_cast<const Pack<T, N>*>(sums.weight + start);
  Pack<bool, N> mask;
  if (sums.mask != nullptr) {
    mask = *reinterpret_cast<const Pack<bool, N>*>(sums.mask + start);
  }
  Pack<float, N> new_total = *total;
  Pack<int, N> new_votes = *votes;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float value = to_float(weight.at[j]);
    mask.at[j] = sums.mask != nullptr ? mask.at[j] : value != 0.0f;
    new_total.at[j] = fmaf(sums.importance, mask.at[j] ? value : 0.0f, new_total.at[j]);
    new_votes.at[j] += mask.at[j];
  }
  *total = new_total;
  *votes = new_votes;
  if (sums.kept != nullptr) {
    auto* const kept = reinterpret_cast<Pack<float, N>*>(sums.kept + start);
    Pack<float, N> new_kept = *kept;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      new_kept.at[j] = __fadd_rn(new_kept.at[j], mask.at[j] ? sums.importance : 0.0f);
    }
    *kept = new_kept;
  }
}

template <int N, class T>
__global__ void __launch_bounds__(ADD_BLOCK) add_client(Sums<T> sums, int64_t packs, int64_t n) {
  const int64_t number = thread_number();
  const int64_t single = number + packs * (N - 1);
  if (number < packs) {
    add_at<N, T>(sums, number * N);
  } else if (single < n) {
    add_at<1, T>(sums, single);
  }
}

constexpr int NUMBERS = 256; // of a table in one launch: 2 KiB, of the 4 that parameters may take

struct Numbers {
  int64_t at[NUMBERS];
};

__global__ void __launch_bounds__(NUMBERS)
    write_numbers(const Numbers numbers, int count, int64_t* __restrict__ table) {
  const int number = threadIdx.x;
  if (number < count) {
    table[number] = numbers.at[number];
  }
}

// A table on the device. The numbers travel as a kernel's parameters, which a launch copies at
// once; a copy from the vector could still be read when it is gone, or would have to be waited for.
Tensor new_table(const Device& device, const Tensor& like, const std::vector<int64_t>& all) {
  const int64_t size = std::ssize(all);
  Tensor table = new_empty(like, {size}, ScalarType::Long);
  for (int64_t first = 0; first < size; first += NUMBERS) {
    const auto count = static_cast<int>(std::min<int64_t>(NUMBERS, size - first));
    Numbers numbers = {};
    std::copy_n(all.begin() + first, count, numbers.at);
    launch(device, &write_numbers, 1, NUMBERS, 0, numbers, count,
           mutable_data<int64_t>(table) + first);
  }
  return table;
}

void add_pointers(const std::vector<Tensor>& tensors, std::vector<int64_t>& table) {
  for (const Tensor& tensor : tensors) {
    table.push_back(reinterpret_cast<intptr_t>(tensor.const_data_ptr()));
  }
}

void check_client(const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype) {
  check_contiguous(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.numel() == like.numel(), name, ": needs clients of one shape");
}

std::tuple<Tensor, Tensor> l0_average(std::vector<Tensor> weights, std::vector<Tensor> masks,
                                      int64_t stream) {
  STD_TORCH_CHECK(!weights.empty() && (masks.empty() || masks.size() == weights.size()),
                  "l0_average: needs clients, and a mask for each or none");
  const Tensor& like = weights.front();
  const bool masked = !masks.empty();
  const auto clients = static_cast<int>(weights.size());
  const int64_t n = like.numel();
  Tensor average = new_empty_like(like, like.scalar_type());
  Tensor votes = new_empty_like(like, ScalarType::Int);
  for_weight_dtype("l0_average", like, [&]<class T>() {
    constexpr int N = 16 / sizeof(T);
    bool aligned = true;
    for (const Tensor& weight : weights) {
      check_client("l0_average", weight, like, like.scalar_type());
      aligned = aligned && is_aligned(weight.const_data_ptr(), sizeof(Pack<T, N>));
    }
    for (const Tensor& mask : masks) {
      check_client("l0_average", mask, like, ScalarType::Bool);
      aligned = aligned && is_aligned(mask.const_data_ptr(), sizeof(Pack<bool, N>));
    }
    if (n == 0) {
      return;
    }
    const Device device(like, stream);
    std::vector<int64_t> pointers;
    add_pointers(weights, pointers);
    add_pointers(masks, pointers);
    const Tensor table = new_table(device, like, pointers);
    const int64_t packs = aligned ? n / N : 0;
    launch(device, masked ? &average_clients<true, N, T> : &average_clients<false, N, T>,
           blocks_for("l0_average", n - packs * (N - 1), AVERAGE_BLOCK), AVERAGE_BLOCK, 0,
           data<int64_t>(table), clients, packs, n, mutable_data<T>(average),
           mutable_data<int>(votes));
  });
  return {average, votes};
}

std::tuple<Tensor, Tensor> l0_average_compressed(std::vector<Tensor> bits,
                                                 std::vector<Tensor> values,
                                                 std::vector<Tensor> offsets, int64_t n,
                                                 int64_t segment, int64_t stream) {
  const char* const name = "l0_average_compressed";
  STD_TORCH_CHECK(!bits.empty() && values.size() == bits.size() && offsets.size() == bits.size(),
                  name, ": needs clients, with bits, values and offsets each");
  const Segments segments = make_segments(name, n, segment);
  const int64_t rows = check_bits(name, bits.front(), segments);
  const Tensor& like = values.front();
  const auto clients = static_cast<int>(bits.size());
  Tensor average = new_empty(like, {rows, n}, like.scalar_type());
  Tensor votes = new_empty(like, {rows, n}, ScalarType::Int);
  for (int client = 0; client < clients; ++client) {
    check_rows(name, bits[client], offsets[client], rows, segments);
    check_contiguous(name, values[client], like.scalar_type());
  }
  if (rows == 0) {
    return {average, votes};
  }
  const Device device(like, stream);
  std::vector<int64_t> numbers;
  add_pointers(bits, numbers);
  add_pointers(values, numbers);
  add_pointers(offsets, numbers);
  for (const Tensor& tensor : values) {
    numbers.push_back(tensor.numel());
  }
  const Tensor table = new_table(device, like, numbers);
  for_weight_dtype(name, like, [&]<class T>() {
    launch(device, &average_segments<T>, blocks_for(name, rows * segments.per_row, 1),
           SEGMENT_BLOCK, 2 * sizeof(SegmentIndex), data<int64_t>(table), clients, segments,
           mutable_data<T>(average), mutable_data<int>(votes));
  });
  return {average, votes};
}

void l0_add_(Tensor total, Tensor votes, std::optional<Tensor> kept, Tensor weight,
             std::optional<Tensor> mask, double importance, int64_t stream) {
  check_client("l0_add_", total, weight, ScalarType::Float);
  check_client("l0_add_", votes, weight, ScalarType::Int);
  check_contiguous("l0_add_", weight, weight.scalar_type());
  if (kept) {
    check_client("l0_add_", *kept, weight, ScalarType::Float);
  }
  if (mask) {
    check_client("l0_add_", *mask, weight, ScalarType::Bool);
  }
  const int64_t n = weight.numel();
  for_weight_dtype("l0_add_", weight, [&]<class T>() {
    if (n == 0) {
      return;
    }
    constexpr int N = 4;
    const Sums<T> sums = {mutable_data<float>(total),
                          mutable_data<int>(votes),
                          kept ? mutable_data<float>(*kept) : nullptr,
                          data<T>(weight),
                          mask ? data<bool>(*mask) : nullptr,
                          static_cast<float>(importance)};
    const bool aligned = is_aligned(sums.total, 16) && is_aligned(sums.votes, 16) &&
                         is_aligned(sums.kept, 16) && is_aligned(sums.weight, N * sizeof(T)) &&
                         is_aligned(sums.mask, N);
    const int64_t packs = aligned ? n / N : 0;
    launch(Device(weight, stream), &add_client<N, T>,
           blocks_for("l0_add_", n - packs * (N - 1), ADD_BLOCK), ADD_BLOCK, 0, sums, packs, n);
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, FEDSPA_DEVICE, m) {
  m.impl("l0_average", TORCH_BOX(&l0_average));
  m.impl("l0_average_compressed", TORCH_BOX(&l0_average_compressed));
  m.impl("l0_add_", TORCH_BOX(&l0_add_));
}
