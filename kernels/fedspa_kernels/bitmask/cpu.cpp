// Bit masks on the CPU: eight bools a byte along the last axis, little bit order.
//
// pack_mask    bool (..., n), contiguous                -> uint8 (..., ceil(n / 8)), spare bits 0
// unpack_mask  uint8 (..., ceil(n / 8)), contiguous, n  -> bool (..., n)
//
// Both are bound by memory, so eight elements are moved as one 64-bit word with a multiplication
// that every CPU has: one binary serves old machines, and no intrinsics are needed to come near the
// speed of a copy.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static_assert(std::endian::native == std::endian::little,
              "element i of a word must be its i-th lowest byte");

// Below this many packed bytes a second thread costs more than it saves.
constexpr int64_t BYTES_PER_TASK = 16384;

constexpr uint64_t LOW_BIT_OF_EACH_BYTE = 0x0101010101010101;

// Byte i holds 0 or 1. The product moves it from bit 8i to bit 56 + i; all 64 partial products land
// on different bits, so nothing carries into the top byte.
uint8_t pack_word(uint64_t bools) {
  return static_cast<uint8_t>((bools * 0x0102040810204080) >> 56);
}

// Every byte gets a copy of `bits` and keeps bit i of it, which is 0 or 2^i. Adding 127 raises the
// top bit of exactly the bytes that are not 0 (2^i + 127 <= 255: no carry), and the shift makes
// that top bit a bool.
uint64_t unpack_word(uint8_t bits) {
  const uint64_t one_bit_each = (bits * LOW_BIT_OF_EACH_BYTE) & 0x8040201008040201;
  return ((one_bit_each + 0x7f7f7f7f7f7f7f7f) >> 7) & LOW_BIT_OF_EACH_BYTE;
}

// Calls word(row, byte, count) for every packed byte, where count <= 8 is the number of elements in
// that byte. The tasks are ranges of bytes, not of rows, so that one long row is shared between the
// threads as well as many short ones.
template <class Word>
void for_each_byte(int64_t rows, int64_t n, const Word& word) {
  const int64_t bytes = (n + 7) / 8;
  torch::stable::parallel_for(0, rows * bytes, BYTES_PER_TASK, [&](int64_t begin, int64_t end) {
    // A copy on this thread's stack: a store through a byte pointer could change the original, for
    // all that the compiler knows, so that it would read the pointers anew for every byte.
    const Word call = word;
    int64_t row = begin / bytes;
    int64_t byte = begin % bytes;
    for (int64_t left = end - begin; left > 0; ++row, byte = 0) {
      const int64_t stop = std::min(bytes, byte + left);
      left -= stop - byte;
      // The whole words stand in a loop of their own, where count is a constant and the copies are
      // single moves.
      for (const int64_t whole = std::min(stop, n / 8); byte < whole; ++byte) {
        call(row, byte, 8);
      }
      if (byte < stop) {
        call(row, byte, n % 8);
      }
    }
  });
}

// A wrong dtype, stride or length would read memory that is not ours, and torch.ops can be called
// past the Python door.
int64_t last_size(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.dim() > 0, name,
                  ": needs a contiguous ", dtype == ScalarType::Bool ? "bool" : "uint8",
                  " tensor of one or more dimensions");
  return tensor.size(tensor.dim() - 1);
}

Tensor with_last_size(const Tensor& like, int64_t size, ScalarType dtype) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = size;
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor pack_mask(const Tensor& mask) {
  const int64_t n = last_size("pack_mask", mask, ScalarType::Bool);
  const int64_t bytes = (n + 7) / 8;
  Tensor packed = with_last_size(mask, bytes, ScalarType::Byte);
  if (packed.numel() == 0) {
    return packed;
  }
  const auto* in = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  for_each_byte(packed.numel() / bytes, n, [=](int64_t row, int64_t byte, int64_t count) {
    uint64_t bools = 0;
    std::memcpy(&bools, in + row * n + byte * 8, count);
    out[row * bytes + byte] = pack_word(bools);
  });
  return packed;
}

Tensor unpack_mask(const Tensor& packed, int64_t n) {
  const int64_t bytes = last_size("unpack_mask", packed, ScalarType::Byte);
  STD_TORCH_CHECK(n >= 0 && bytes == (n + 7) / 8, "unpack_mask: ", n, " elements need ",
                  (n + 7) / 8, " bytes along the last axis, and there are ", bytes);
  Tensor mask = with_last_size(packed, n, ScalarType::Bool);
  if (mask.numel() == 0) {
    return mask;
  }
  const auto* in = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  for_each_byte(packed.numel() / bytes, n, [=](int64_t row, int64_t byte, int64_t count) {
    const uint64_t bools = unpack_word(in[row * bytes + byte]);
    std::memcpy(out + row * n + byte * 8, &bools, count);
  });
  return mask;
}

} // namespace

// A fragment, so that every operator's file can add its own definitions to the one namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(fedspa_native, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor bits, int n) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
}
