// What the compiler's checks call when kernels are compiled with
//
//   -fsanitize=alignment,bounds,shift-exponent -fno-sanitize-recover=all
//
// A GPU faults on a misaligned vector, silently leaves a local array, and shifts by 32 otherwise
// than a CPU. Defined here, so that the sanitizer's own library is not needed, and a
// violation is an error of the launch like any other.

#include <cstdint>
#include <string>

#include "execution.h"

namespace {

// The first member of what every handler gets.
struct Place {
  const char* file;
  uint32_t line;
  uint32_t column;
};

[[noreturn]] void fail(const char* what, const Place* place) {
  shim::fail(std::string(what) + " at " + place->file + ":" + std::to_string(place->line));
}

} // namespace

extern "C" {

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Place* place, const void*) {
  fail("a misaligned pointer", place);
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(const Place* place, const void*) {
  fail("an index outside of an array", place);
}

[[noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(const Place* place, const void*,
                                                           const void*) {
  fail("a shift by a negative number or by too many bits", place);
}
}
