// A stack of its own for each thread of a block, so that a thread can stop at a barrier.

#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

namespace shim {

// ucontext starts a fiber; setjmp switches, since swapcontext makes a system call each time and a
// block of 1024 threads switches a million times. A fiber that returned from its work can be
// given more; one that is destroyed in the middle of it is forgotten, its destructors not run.
class Fiber {
 public:
  // entry: called once, and never returns: it calls pause() instead
  explicit Fiber(void (*entry)()) : entry_(entry) {
    stack_ = mmap(nullptr, GUARD + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    // Stacks grow down, into the guard: an overflow is a fault, and not another thread's variables.
    if (stack_ == MAP_FAILED ||
        mprotect(static_cast<char*>(stack_) + GUARD, STACK, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { munmap(stack_, GUARD + STACK); }

  // Called by the scheduler: runs the fiber until it pauses.
  __attribute__((noinline)) void resume() {
    if (_setjmp(scheduler_) != 0) {
      return;
    }
    if (started_) {
      _longjmp(here_, 1);
    }
    started_ = true;
    getcontext(&start_);
    start_.uc_stack.ss_sp = static_cast<char*>(stack_) + GUARD;
    start_.uc_stack.ss_size = STACK;
    start_.uc_link = nullptr;
    makecontext(&start_, entry_, 0);
    setcontext(&start_);
  }

  // Called on the fiber: back to the scheduler.
  __attribute__((noinline)) void pause() {
    if (_setjmp(here_) == 0) {
      _longjmp(scheduler_, 1);
    }
  }

 private:
  static constexpr size_t STACK = 64 * 1024;
  static constexpr size_t GUARD = 64 * 1024; // a whole page, whatever the machine's page is

  inline static jmp_buf scheduler_;
  void (*entry_)();
  void* stack_;
  bool started_ = false;
  jmp_buf here_;
  ucontext_t start_;
};

} // namespace shim
