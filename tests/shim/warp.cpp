// Warp operations: the lanes of a mask meet, and then each gets its answer.

#undef _FORTIFY_SOURCE // see execution.cpp

#include "threads.h"

namespace shim {
namespace {

struct Warp {
  unsigned first;
  unsigned lanes;

  Thread& operator[](unsigned lane) const { return threads[first + lane]; }

  // The first lane of the mask that does not wait where `thread` does, or 32.
  unsigned missing(const Thread& thread) const {
    for (unsigned lane = 0; lane < LANES; ++lane) {
      if (!(thread.request.mask >> lane & 1)) {
        continue;
      }
      if (lane >= lanes) {
        return lane;
      }
      const Thread& other = (*this)[lane];
      if (other.state != State::in_warp_operation || !at_one_place(other, thread) ||
          other.request.operation != thread.request.operation ||
          other.request.mask != thread.request.mask) {
        return lane;
      }
    }
    return LANES;
  }

  uint64_t shuffle(const Thread& thread) const {
    const Request& request = thread.request;
    const int own = thread.lane;
    const int base = own - own % request.width;
    int source = own;
    switch (request.operation) {
      case Operation::shuffle:
        source = base + (request.lane & (request.width - 1));
        break;
      case Operation::shuffle_up:
        source = own - request.lane;
        break;
      case Operation::shuffle_down:
        source = own + request.lane;
        break;
      default:
        source = own ^ request.lane;
    }
    const bool below = source < base && request.operation == Operation::shuffle_up;
    if (below || source >= base + request.width) {
      source = own;
    }
    if (!(request.mask >> source & 1)) {
      set_error(thread, " and reads lane ", source, ", which is not in its mask");
      return 0;
    }
    return (*this)[source].request.value;
  }

  uint64_t answer(const Thread& thread) const {
    const Request& request = thread.request;
    unsigned not_zero = 0;
    unsigned equal = 0;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if (request.mask >> lane & 1) {
        const uint64_t value = (*this)[lane].request.value;
        not_zero |= unsigned{value != 0} << lane;
        equal |= unsigned{value == request.value} << lane;
      }
    }
    switch (request.operation) {
      case Operation::sync:
        return 0;
      case Operation::ballot:
        return not_zero;
      case Operation::any:
        return not_zero != 0;
      case Operation::all:
        return not_zero == request.mask;
      case Operation::match_any:
        return equal;
      default:
        return shuffle(thread);
    }
  }

  // Lets the lanes go on whose whole mask has arrived; returns whether there were any.
  bool answer_requests() const {
    bool answered = false;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      Thread& thread = (*this)[lane];
      if (thread.state != State::in_warp_operation || missing(thread) < LANES) {
        continue;
      }
      for (unsigned other = 0; other < lanes; ++other) {
        if (thread.request.mask >> other & 1) {
          (*this)[other].answer = answer((*this)[other]);
          (*this)[other].state = State::ready;
        }
      }
      answered = true;
    }
    return answered;
  }

  void run_ready_lanes() const {
    const auto order = shuffled(lanes);
    for (unsigned i = 0; i < lanes && error.empty(); ++i) {
      Thread& thread = (*this)[order[i]];
      if (thread.state == State::ready) {
        current = &thread;
        threadIdx = thread.index;
        thread.fiber.resume();
        current = nullptr;
      }
    }
  }

  void check_nobody_waits() const {
    for (unsigned lane = 0; lane < lanes && error.empty(); ++lane) {
      const Thread& thread = (*this)[lane];
      if (thread.state != State::in_warp_operation) {
        continue;
      }
      const unsigned absent = missing(thread);
      if (absent < lanes) {
        set_error(thread, " for lane ", absent, ", but ", (*this)[absent]);
      } else {
        set_error(thread, " for lane ", absent, ", which the block does not have");
      }
    }
  }
};

} // namespace

void run_warp(unsigned first_thread, unsigned lanes) {
  const Warp warp{first_thread, lanes};
  do {
    warp.run_ready_lanes();
  } while (error.empty() && warp.answer_requests());
  warp.check_nobody_waits();
}

} // namespace shim
