// Stands in for csrc/device.cuh, where it says what these do: the same kernels without a GPU.

#pragma once

#include <cuda_runtime.h>
#include <tensors.h>
#include <floats.cuh>

#include <cstddef>
#include <cstdint>

#define FEDSPA_DEVICE CPU

namespace fedspa {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

struct Device {
  Device(const Tensor&, int64_t) {}

  cudaStream_t stream = nullptr;
};

inline int multiprocessors(const Device&) {
  return shim::MULTIPROCESSORS;
}

inline size_t shared_limit(const Device&) {
  return shim::SHARED_LIMIT;
}

constexpr size_t SMALLEST_SHARED_LIMIT = 99 * 1024;

template <class T>
T* shared_memory() {
  return static_cast<T*>(shim::shared_memory());
}

template <class... Parameters, class... Arguments>
void launch(const Device&, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments... arguments) {
  shim::run(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

} // namespace fedspa
