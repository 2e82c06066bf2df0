// CUDA's execution model on one CPU thread; see execution.cpp.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now. The scheduler sets them before it resumes a thread.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

// As on sm_90.
constexpr size_t SHARED_LIMIT = 227 * 1024;

// Few, so that loops over the grid go around.
constexpr int MULTIPROCESSORS = 3;

enum class Operation {
  sync,
  ballot,
  any,
  all,
  match_any,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor
};

// What one lane brings to a warp operation.
struct Request {
  Operation operation;
  unsigned mask;
  uint64_t value;
  int lane; // shuffles: the lane, the distance or the lane's mask
  int width;
};

// Runs every thread of every block. std::runtime_error says which rule of CUDA's was broken.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// The functions below are called by kernels.
void* shared_memory();
void barrier(const std::source_location& where);
uint64_t warp_operation(const Request& request, const std::source_location& where);
[[noreturn]] void fail(const std::string& message);

} // namespace shim
