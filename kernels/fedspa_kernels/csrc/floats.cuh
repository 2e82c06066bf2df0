// The dtypes of weights, as the kernels see them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <tensors.h>

namespace fedspa {

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(__half value) {
  return __half2float(value);
}
__device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

// Rounds to nearest, ties to even, as torch does.
template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Runs call.operator()<T>() with the T of a weight's dtype: [&]<class T>() { ... }.
template <class Call>
void for_weight_dtype(const char* name, const Tensor& weight, const Call& call) {
  check_weight(name, weight);
  switch (weight.scalar_type()) {
    case ScalarType::Half:
      return call.template operator()<__half>();
    case ScalarType::BFloat16:
      return call.template operator()<__nv_bfloat16>();
    default:
      return call.template operator()<float>();
  }
}

} // namespace fedspa
