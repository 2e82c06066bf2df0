// How cuda.cu meets the device: where a kernel runs, its launch, and its shared memory.
//
// Kernels use nothing of CUDA beside this, the index variables, and the barriers, warp operations,
// integer atomics and conversions. The tests put files of their own before this folder
// in the include path (tests/shim), and so run the very same kernels without a GPU: hence the
// angle brackets in #include <device.cuh>.

#pragma once

#include <cuda_runtime.h>
#include <tensors.h>
#include <torch/csrc/stable/accelerator.h>
#include <floats.cuh>

#include <cstddef>
#include <cstdint>

// The dispatch key that cuda.cu registers its operators with.
#define FEDSPA_DEVICE CUDA

namespace fedspa {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes the tensor's device the current one for as long as this object lives.
struct Device {
  // stream: PyTorch's current cudaStream_t of that device, as an integer. The caller in Python
  // passes it, since torch 2.10's stable ABI does not give it away.
  Device(const Tensor& tensor, int64_t stream)
      : index(tensor.get_device()),
        guard(index),
        stream(reinterpret_cast<cudaStream_t>(static_cast<intptr_t>(stream))) {}

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
    return value;
  }

  int index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

inline int multiprocessors(const Device& device) {
  return device.attribute(cudaDevAttrMultiProcessorCount);
}

// The most shared memory that a block can have, in bytes: 163 KiB on sm_80, 227 KiB on sm_90.
inline size_t shared_limit(const Device& device) {
  return device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// The smallest of these among the GPUs from sm_80 on (sm_86 and sm_89). What a kernel asks for
// whatever its tensors are is held below it by a static_assert beside the kernel.
constexpr size_t SMALLEST_SHARED_LIMIT = 99 * 1024;

// The block's dynamic shared memory, aligned to 16 bytes: the only shared memory that kernels use.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char fedspa_shared_memory[];
  return reinterpret_cast<T*>(fedspa_shared_memory);
}

// Starts a kernel on the device's stream. The grid may not be empty.
template <class... Parameters, class... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments... arguments) {
  // What a block has without asking is 48 KiB on every GPU.
  if (shared_bytes > 48 * 1024) {
    const size_t limit = shared_limit(device);
    STD_TORCH_CHECK(shared_bytes <= limit, "a block needs ", shared_bytes,
                    " bytes of shared memory, and can have ", limit, " on this GPU");
    // Always the limit: the attribute is the kernel's, and another thread may launch it too.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(limit)),
               "cudaFuncSetAttribute");
  }
  kernel<<<grid, block, shared_bytes, device.stream>>>(arguments...);
  check_cuda(cudaGetLastError(), "the launch of a kernel");
}

} // namespace fedspa
