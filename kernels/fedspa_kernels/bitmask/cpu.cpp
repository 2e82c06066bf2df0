// Bit masks and compressed weights on the CPU.
//
// pack_mask          bool (..., n) -> uint8 (..., ceil(n / 8)), little bit order, spare bits 0
// unpack_mask        the inverse
// count_kept         bits (rows, ceil(n / 8)) -> int64 (rows * segments,), the set bits of each
// compress_values    weight (rows, n) and bits -> values (kept,), those whose bit is set
// decompress_values  the inverse, 0 where a bit is not set
//
// A row is cut into segments (a multiple of eight elements, the last may be shorter). `offsets`
// says where the values of each segment begin, so that segments are independent tasks.

#include <bits.h>
#include <pages.h>
#include <torch/csrc/stable/library.h>

#include <vector>

namespace {

using namespace fedspa;

// Below this many packed bytes a second thread costs more than it saves.
constexpr int64_t BYTES_PER_TASK = 16384;

// Calls word(row, byte, count) for every packed byte, where count <= 8 is the number of elements in
// that byte. The tasks are ranges of bytes, not of rows, so that one long row is shared between the
// threads as well as many short ones.
template <class Word>
void for_each_byte(int64_t rows, int64_t n, const Word& word) {
  const int64_t bytes = (n + 7) / 8;
  for_ranges(rows * bytes, BYTES_PER_TASK, [=](int64_t begin, int64_t end) FEDSPA_BODY {
    int64_t row = begin / bytes;
    int64_t byte = begin % bytes;
    for (int64_t left = end - begin; left > 0; ++row, byte = 0) {
      const int64_t stop = std::min(bytes, byte + left);
      left -= stop - byte;
      // The whole words stand in a loop of their own, where count is a constant and the copies are
      // single moves.
      for (const int64_t whole = std::min(stop, n / 8); byte < whole; ++byte) {
        word(row, byte, 8);
      }
      if (byte < stop) {
        word(row, byte, n % 8);
      }
    }
  });
}

Tensor pack_mask(const Tensor& mask, int64_t) {
  check_contiguous("pack_mask", mask, ScalarType::Bool);
  STD_TORCH_CHECK(mask.dim() > 0, "pack_mask: needs an axis to pack along");
  const int64_t n = mask.size(mask.dim() - 1);
  const int64_t bytes = (n + 7) / 8;
  Tensor packed = with_last_size(mask, bytes, ScalarType::Byte);
  if (packed.numel() == 0) {
    return packed;
  }
  const auto* in = data<uint8_t>(mask);
  auto* out = mutable_data<uint8_t>(packed);
  for_each_byte(packed.numel() / bytes, n,
                [=](int64_t row, int64_t byte, int64_t count) FEDSPA_BODY {
                  uint64_t bools = 0;
                  std::memcpy(&bools, in + row * n + byte * 8, count);
                  out[row * bytes + byte] = pack_word(bools);
                });
  return packed;
}

Tensor unpack_mask(const Tensor& packed, int64_t n, int64_t) {
  check_contiguous("unpack_mask", packed, ScalarType::Byte);
  STD_TORCH_CHECK(packed.dim() > 0, "unpack_mask: needs an axis to unpack along");
  const int64_t bytes = packed.size(packed.dim() - 1);
  STD_TORCH_CHECK(n >= 0 && bytes == (n + 7) / 8, "unpack_mask: ", n, " elements need ",
                  (n + 7) / 8, " bytes along the last axis, and there are ", bytes);
  Tensor mask = with_last_size(packed, n, ScalarType::Bool);
  advise_large_pages(mask);
  if (mask.numel() == 0) {
    return mask;
  }
  const auto* in = data<uint8_t>(packed);
  auto* out = mutable_data<uint8_t>(mask);
  for_each_byte(packed.numel() / bytes, n,
                [=](int64_t row, int64_t byte, int64_t count) FEDSPA_BODY {
                  const uint64_t bools = unpack_word(in[row * bytes + byte]);
                  std::memcpy(out + row * n + byte * 8, &bools, count);
                });
  return mask;
}

// The segments of (rows, n) elements and their bits.
struct Segments {
  int64_t n;
  int64_t size;
  int64_t in_row;
  int64_t count;

  Segments(const char* name, const Tensor& bits, int64_t n, int64_t size)
      : n(n), size(size), in_row(0), count(0) {
    check_contiguous(name, bits, ScalarType::Byte);
    STD_TORCH_CHECK(n >= 0 && size > 0 && size % 8 == 0, name,
                    ": needs n >= 0 and segments of a multiple of 8");
    STD_TORCH_CHECK(bits.dim() == 2 && bits.size(1) == (n + 7) / 8, name,
                    ": needs bits (rows, ceil(n / 8))");
    in_row = (n + size - 1) / size;
    count = bits.size(0) * in_row;
  }

  // Calls call(segment, first element, first byte, elements) for every segment, in parallel.
  template <class Call>
  void for_each(const Call& call) const {
    const int64_t grain = std::max<int64_t>(1, BYTES_PER_TASK * 4 / size);
    for_ranges(count, grain, [call, segments = *this](int64_t begin, int64_t end) FEDSPA_BODY {
      const int64_t bytes = (segments.n + 7) / 8;
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t row = segment / segments.in_row;
        const int64_t first = segment % segments.in_row * segments.size;
        call(segment, row * segments.n + first, row * bytes + first / 8,
             std::min(segments.size, segments.n - first));
      }
    });
  }
};

Tensor count_kept(const Tensor& bits, int64_t n, int64_t segment, int64_t) {
  const Segments segments("count_kept", bits, n, segment);
  Tensor counts = new_empty(bits, {segments.count}, ScalarType::Long);
  const auto* in = data<uint8_t>(bits);
  auto* out = mutable_data<int64_t>(counts);
  segments.for_each([=](int64_t index, int64_t, int64_t byte, int64_t elements)
                        FEDSPA_BODY { out[index] = count_bits(in + byte, (elements + 7) / 8); });
  return counts;
}

Tensor compress_values(const Tensor& weight, const Tensor& bits, const Tensor& offsets,
                       int64_t kept, int64_t segment, int64_t) {
  STD_TORCH_CHECK(weight.dim() == 2, "compress_values: needs a weight (rows, n)");
  const Segments segments("compress_values", bits, weight.size(1), segment);
  check_contiguous("compress_values", weight, weight.scalar_type());
  check_sizes("compress_values", weight, {bits.size(0), segments.n});
  check_contiguous("compress_values", offsets, ScalarType::Long);
  check_sizes("compress_values", offsets, {segments.count});
  Tensor values = new_output(weight, {kept}, weight.scalar_type());
  const auto* in_bits = data<uint8_t>(bits);
  const auto* starts = data<int64_t>(offsets);
  for_element_size("compress_values", weight, [&]<class T>() {
    const auto* in = data<T>(weight);
    auto* out = mutable_data<T>(values);
    segments.for_each([=, count = segments.count](int64_t index, int64_t first, int64_t byte,
                                                  int64_t elements) FEDSPA_BODY {
      compress(in_bits + byte, elements, in + first, run_of(out, kept, starts, index, count));
    });
  });
  return values;
}

Tensor decompress_values(const Tensor& bits, const Tensor& values, const Tensor& offsets, int64_t n,
                         int64_t segment, int64_t) {
  const Segments segments("decompress_values", bits, n, segment);
  check_contiguous("decompress_values", values, values.scalar_type());
  check_contiguous("decompress_values", offsets, ScalarType::Long);
  check_sizes("decompress_values", offsets, {segments.count});
  Tensor weight = new_output(values, {bits.size(0), n}, values.scalar_type());
  const int64_t kept = values.numel();
  const auto* in_bits = data<uint8_t>(bits);
  const auto* starts = data<int64_t>(offsets);
  for_element_size("decompress_values", values, [&]<class T>() {
    const auto* in = data<T>(values);
    auto* out = mutable_data<T>(weight);
    segments.for_each([=, count = segments.count](int64_t index, int64_t first, int64_t byte,
                                                  int64_t elements) FEDSPA_BODY {
      Run<const T> run = run_of(in, kept, starts, index, count);
      expand(in_bits + byte, elements, run, out + first);
    });
  });
  return weight;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("count_kept", TORCH_BOX(&count_kept));
  m.impl("compress_values", TORCH_BOX(&compress_values));
  m.impl("decompress_values", TORCH_BOX(&decompress_values));
}
