// l0_average, l0_average_compressed and l0_add_ on the CPU: each weight's mean over the clients
// that kept it, 0 where nobody did.
//
// A chunk of the result stays in the first cache while all clients' chunks pass by, so that every
// input is read once and nothing is stacked. Sums are float32 in client order, as the reference's:
// there is no product beside a sum that could be contracted, so the bits agree.

#include <pages.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "average.h"

namespace {

using namespace fedspa;
using namespace fedspa::l0;

template <class T>
std::vector<const T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<const T*> result;
  for (const Tensor& tensor : tensors) {
    result.push_back(data<T>(tensor));
  }
  return result;
}

std::tuple<Tensor, Tensor> l0_average(std::vector<Tensor> weights, std::vector<Tensor> masks,
                                      int64_t) {
  STD_TORCH_CHECK(!weights.empty() && (masks.empty() || masks.size() == weights.size()),
                  "l0_average: needs one or more weights, and no masks or one for each");
  const Tensor& first = weights[0];
  const int64_t n = first.numel();
  for (const Tensor& weight : weights) {
    check_contiguous("l0_average", weight, first.scalar_type());
    STD_TORCH_CHECK(weight.numel() == n, "l0_average: needs weights of one shape");
  }
  for (const Tensor& mask : masks) {
    check_contiguous("l0_average", mask, ScalarType::Bool);
    STD_TORCH_CHECK(mask.numel() == n, "l0_average: needs masks of the weights' shape");
  }
  Tensor average = new_output(first, first.scalar_type());
  Tensor votes = new_output(first, ScalarType::Int);
  const auto kept = pointers<uint8_t>(masks);
  for_weight_dtype("l0_average", first, [&]<class T>() {
    const auto values = pointers<T>(weights);
    const Clients<T> clients{values.data(), kept.empty() ? nullptr : kept.data(),
                             static_cast<int64_t>(values.size()), n};
    for_ranges((n + CHUNK - 1) / CHUNK, 4,
               [clients, average = mutable_data<T>(average), votes = mutable_data<int32_t>(votes)](
                   int64_t begin, int64_t end) FEDSPA_BODY {
                 for (int64_t chunk = begin; chunk < end; ++chunk) {
                   average_chunk(clients, chunk * CHUNK, average, votes);
                 }
               });
  });
  return {average, votes};
}

std::tuple<Tensor, Tensor> l0_average_compressed(std::vector<Tensor> bits,
                                                 std::vector<Tensor> values,
                                                 std::vector<Tensor> offsets, int64_t n,
                                                 int64_t segment, int64_t) {
  constexpr const char* NAME = "l0_average_compressed";
  STD_TORCH_CHECK(!bits.empty() && values.size() == bits.size() && offsets.size() == bits.size(),
                  NAME, ": needs the bits, values and offsets of one or more clients");
  STD_TORCH_CHECK(bits[0].dim() == 2 && n >= 0 && segment > 0 && segment % 8 == 0, NAME,
                  ": needs bits (rows, ceil(n / 8)), and segments of a multiple of 8");
  const int64_t rows = bits[0].size(0);
  const int64_t segments = rows * ((n + segment - 1) / segment);
  std::vector<int64_t> kept;
  for (size_t client = 0; client < bits.size(); ++client) {
    check_contiguous(NAME, bits[client], ScalarType::Byte);
    check_sizes(NAME, bits[client], {rows, (n + 7) / 8});
    check_contiguous(NAME, values[client], values[0].scalar_type());
    check_contiguous(NAME, offsets[client], ScalarType::Long);
    check_sizes(NAME, offsets[client], {segments});
    kept.push_back(values[client].numel());
  }
  Tensor average = new_output(values[0], {rows, n}, values[0].scalar_type());
  Tensor votes = new_output(values[0], {rows, n}, ScalarType::Int);
  const auto all_bits = pointers<uint8_t>(bits);
  const auto all_offsets = pointers<int64_t>(offsets);
  for_weight_dtype(NAME, values[0], [&]<class T>() {
    const auto all_values = pointers<T>(values);
    const CompressedClients<T> clients{all_bits, all_values, all_offsets, kept, rows, n, segment};
    const int64_t grain = std::max<int64_t>(1, 4 * CHUNK / segment);
    torch::stable::parallel_for(0, segments, grain, [&](int64_t begin, int64_t end) {
      std::vector<Run<const T>> runs(all_bits.size());
      for (int64_t index = begin; index < end; ++index) {
        average_segment(clients, index, runs, mutable_data<T>(average),
                        mutable_data<int32_t>(votes));
      }
    });
  });
  return {average, votes};
}

// total += importance * m * w, votes += m, kept += importance * m.
void l0_add_(Tensor total, Tensor votes, std::optional<Tensor> kept, const Tensor& weight,
             std::optional<Tensor> mask, double importance, int64_t) {
  const int64_t n = weight.numel();
  check_contiguous("l0_add_", weight, weight.scalar_type());
  check_contiguous("l0_add_", total, ScalarType::Float);
  check_contiguous("l0_add_", votes, ScalarType::Int);
  STD_TORCH_CHECK(total.numel() == n && votes.numel() == n, "l0_add_: needs one shape");
  if (kept) {
    check_contiguous("l0_add_", *kept, ScalarType::Float);
    STD_TORCH_CHECK(kept->numel() == n, "l0_add_: needs one shape");
  }
  if (mask) {
    check_contiguous("l0_add_", *mask, ScalarType::Bool);
    STD_TORCH_CHECK(mask->numel() == n, "l0_add_: needs one shape");
  }
  for_weight_dtype("l0_add_", weight, [&]<class T>() {
    for_ranges((n + CHUNK - 1) / CHUNK, 8,
               [=, sums = mutable_data<float>(total), counts = mutable_data<int32_t>(votes),
                shares = kept ? mutable_data<float>(*kept) : nullptr, values = data<T>(weight),
                bools = mask ? data<uint8_t>(*mask) : nullptr,
                factor = static_cast<float>(importance)](int64_t begin, int64_t end) FEDSPA_BODY {
                 uint8_t flags[CHUNK];
                 for (int64_t at = begin * CHUNK; at < std::min(end * CHUNK, n); at += CHUNK) {
                   const int64_t size = std::min(CHUNK, n - at);
                   const uint8_t* flag = bools == nullptr ? flags : bools + at;
                   for (int64_t i = 0; i < size && bools == nullptr; ++i) {
                     flags[i] = static_cast<uint8_t>(not_zero(to_float(values[at + i])));
                   }
                   for (int64_t i = 0; i < size; ++i) {
                     sums[at + i] += factor * kept_or_zero(to_float(values[at + i]), flag[i] != 0);
                     counts[at + i] += flag[i] != 0;
                   }
                   for (int64_t i = 0; i < size && shares != nullptr; ++i) {
                     shares[at + i] += float_of(float_bits(factor) & (0u - (flag[i] != 0)));
                   }
                 }
               });
  });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("l0_average", TORCH_BOX(&l0_average));
  m.impl("l0_average_compressed", TORCH_BOX(&l0_average_compressed));
  m.impl("l0_add_", TORCH_BOX(&l0_add_));
}
