// Checks and outputs that the launchers of cpu.cpp and cuda.cu share.
//
// The Python doors check everything in sentences. These stand against calls that go past the doors,
// through torch.ops, and would read or write memory that is not ours.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace fedspa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": needs another dtype");
}

inline void check_contiguous(const char* name, const Tensor& tensor, ScalarType dtype) {
  check_dtype(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": needs a contiguous tensor");
}

inline void check_weight(const char* name, const Tensor& weight) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      name, ": needs float32, float16 or bfloat16");
}

inline void check_sizes(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (const int64_t size : sizes) {
    same = same && tensor.size(axis++) == size;
  }
  STD_TORCH_CHECK(same, name, ": needs another shape");
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

inline Tensor new_empty_like(const Tensor& like, ScalarType dtype) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes.begin(), sizes.end()), dtype);
}

inline Tensor with_last_size(const Tensor& like, int64_t size, ScalarType dtype) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = size;
  return torch::stable::new_empty(like, shape, dtype);
}

// Runs call.operator()<T>() with a T as large as the elements, which are only moved.
template <class Call>
void for_element_size(const char* name, const Tensor& tensor, const Call& call) {
  switch (tensor.element_size()) {
    case 2:
      return call.template operator()<uint16_t>();
    case 4:
      return call.template operator()<uint32_t>();
    case 8:
      return call.template operator()<uint64_t>();
    default:
      STD_TORCH_CHECK(false, name, ": needs elements of 2, 4 or 8 bytes");
  }
}

// The flag that kernels raise where a value is refused.
inline Tensor new_flag(const Tensor& like) {
  return torch::stable::new_zeros(like, std::vector<int64_t>{1}, ScalarType::Int);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

} // namespace fedspa
