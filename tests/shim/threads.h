// The threads of the block that runs now: what execution.cpp and warp.cpp share.

#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>

#include "execution.h"
#include "fiber.h"

namespace shim {

constexpr unsigned LANES = 32;

enum class State { ready, at_barrier, in_warp_operation, exited };

void run_threads_forever();

struct Thread {
  Fiber fiber{run_threads_forever};
  State state = State::exited;
  dim3 index;
  unsigned lane = 0;
  // Of the barrier or the warp operation that it waits in.
  std::source_location where;
  Request request{};
  uint64_t answer = 0;
};

inline std::deque<Thread> threads; // as many as the largest block had; a fiber cannot be moved
inline Thread* current = nullptr; // nullptr while the scheduler runs
inline std::string error; // not empty: the launch has failed, and no thread is resumed

inline std::ostream& operator<<(std::ostream& out, const dim3& index) {
  return out << "(" << index.x << ", " << index.y << ", " << index.z << ")";
}

inline std::ostream& operator<<(std::ostream& out, const Thread& thread) {
  out << "thread " << thread.index;
  switch (thread.state) {
    case State::ready:
      return out;
    case State::exited:
      return out << " has exited";
    default:
      return out << (thread.state == State::at_barrier ? " waits at the barrier of "
                                                       : " waits in the warp operation of ")
                 << thread.where.file_name() << ":" << thread.where.line();
  }
}

// The first error stands; what comes after it is its consequence.
template <class... Parts>
void set_error(const Parts&... parts) {
  if (error.empty()) {
    std::ostringstream message;
    message << "block " << blockIdx << ": ";
    (message << ... << parts);
    error = message.str();
  }
}

inline bool at_one_place(const Thread& left, const Thread& right) {
  return left.where.line() == right.where.line() && left.where.column() == right.where.column() &&
         std::string_view(left.where.file_name()) == right.where.file_name();
}

// The numbers below `count` in an order that differs each time: Fisher-Yates over xorshift.
inline std::array<unsigned, LANES> shuffled(unsigned count) {
  static uint32_t random = 2463534242u;
  std::array<unsigned, LANES> order;
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned left = count; left > 1; --left) {
    random ^= random << 13;
    random ^= random >> 17;
    random ^= random << 5;
    std::swap(order[left - 1], order[random % left]);
  }
  return order;
}

// Runs a warp's threads until each is at a barrier or has exited. The last warp of a block may have
// fewer than 32.
void run_warp(unsigned first_thread, unsigned lanes);

} // namespace shim
