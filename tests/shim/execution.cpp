// CUDA's execution model on one CPU thread, as unkind as the model allows.
//
// Blocks run one after another, the last first. A block's threads are fibers. Between two barriers
// the warps run one after another in a shuffled order, and so do the lanes of a warp between two
// warp operations: where a barrier is missing, a thread reads what is not there yet. The shuffles
// are the same in every run. What CUDA leaves undefined is an error that ends the launch:
//
//   a barrier that some threads of the block do not reach, or reach elsewhere in the source
//   a warp operation without all lanes of its mask, or from a lane outside its mask
//   a shuffle that reads a lane outside the mask
//   a write beyond the shared memory that was asked for; what was asked for starts as NaNs
//   a launch beyond CUDA's limits
//   what sanitizer.cpp is told of

// glibc's checked longjmp takes a switch between stacks for an attack.
#undef _FORTIFY_SOURCE

#include "execution.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "threads.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

constexpr size_t GUARD = 4096;
constexpr unsigned char GUARD_BYTE = 0xa5;
// A NaN in float32, float16 and bfloat16, and an index far outside of everything.
constexpr uint32_t POISON = 0x7ff57ff5;

const std::function<void()>* work;
unsigned block_threads;
size_t shared_size;
alignas(16) unsigned char shared[GUARD + SHARED_LIMIT + GUARD];

void poison_shared() {
  unsigned char* const begin = shared + GUARD;
  auto* const words = reinterpret_cast<uint32_t*>(begin);
  std::fill_n(words, (shared_size + sizeof(POISON) - 1) / sizeof(POISON), POISON);
  std::fill(shared, begin, GUARD_BYTE);
  std::fill_n(begin + shared_size, GUARD, GUARD_BYTE);
}

void check_guards() {
  const auto untouched = [](unsigned char byte) { return byte == GUARD_BYTE; };
  const unsigned char* const end = shared + GUARD + shared_size;
  if (!std::all_of(shared, shared + GUARD, untouched) ||
      !std::all_of(end, end + GUARD, untouched)) {
    set_error("a write outside the ", shared_size, " bytes of shared memory that were asked for");
  }
}

// Whether all threads wait at one barrier; false where all have exited.
bool at_barrier() {
  const Thread& first = threads[0];
  for (unsigned i = 1; i < block_threads; ++i) {
    const Thread& thread = threads[i];
    if (thread.state != first.state ||
        (first.state == State::at_barrier && !at_one_place(thread, first))) {
      set_error("a barrier without all threads of the block: ", first, ", but ", thread);
    }
  }
  return error.empty() && first.state == State::at_barrier;
}

void run_block(dim3 block) {
  poison_shared();
  for (unsigned i = 0; i < block_threads; ++i) {
    threads[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    threads[i].lane = i % LANES;
  }
  const unsigned warps = (block_threads + LANES - 1) / LANES;
  do {
    for (unsigned i = 0; i < block_threads; ++i) {
      threads[i].state = State::ready;
    }
    const auto order = shuffled(warps);
    for (unsigned i = 0; i < warps && error.empty(); ++i) {
      const unsigned first = order[i] * LANES;
      run_warp(first, std::min(LANES, block_threads - first));
    }
  } while (error.empty() && at_barrier());
  check_guards();
}

void check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
  const bool in_grid = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff &&
                       grid.y <= 65535 && grid.z <= 65535;
  const bool in_block = block.x > 0 && block.y > 0 && block.z > 0 && block.x <= 1024 &&
                        block.y <= 1024 && block.z <= 64 && block.x * block.y * block.z <= 1024;
  if (!in_grid || !in_block || shared_bytes > SHARED_LIMIT) {
    std::ostringstream message;
    message << "a grid of " << grid << " blocks of " << block << " threads with " << shared_bytes
            << " bytes of shared memory is beyond CUDA's limits";
    throw std::runtime_error(message.str());
  }
}

} // namespace

// The entry of every fiber: its thread's work, in one block after another.
void run_threads_forever() {
  Thread& self = *current;
  for (;;) {
    (*work)();
    self.state = State::exited;
    self.fiber.pause();
  }
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  check_limits(grid, block, shared_bytes);
  gridDim = grid;
  blockDim = block;
  block_threads = block.x * block.y * block.z;
  shared_size = shared_bytes;
  work = &thread;
  while (threads.size() < block_threads) {
    threads.emplace_back();
  }
  for (uint64_t left = uint64_t{grid.x} * grid.y * grid.z; left > 0 && error.empty(); --left) {
    const uint64_t i = left - 1;
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block(block);
  }
  // Thrown here, on the caller's stack: an exception cannot leave a fiber.
  if (!error.empty()) {
    threads.clear(); // fibers in the middle of their work cannot be given another kernel
    throw std::runtime_error(std::exchange(error, {}));
  }
}

void* shared_memory() {
  return shared + GUARD;
}

void barrier(const std::source_location& where) {
  Thread& self = *current;
  self.state = State::at_barrier;
  self.where = where;
  self.fiber.pause();
}

uint64_t warp_operation(const Request& request, const std::source_location& where) {
  Thread& self = *current;
  self.state = State::in_warp_operation;
  self.where = where;
  self.request = request;
  if (!(request.mask >> self.lane & 1)) {
    fail("is not in the mask that it passes");
  }
  self.fiber.pause();
  return self.answer;
}

void fail(const std::string& message) {
  if (current == nullptr) {
    std::fprintf(stderr, "outside of a kernel: %s\n", message.c_str());
    std::abort();
  }
  set_error(*current, ": ", message);
  for (;;) {
    current->fiber.pause();
  }
}

} // namespace shim
