// Bit masks and compressed weights on the GPU.
//
// pack_mask          bool (..., n)                       -> uint8 (..., ceil(n / 8)), spare bits 0
// unpack_mask        the inverse
// count_kept         bits (rows, bytes)                  -> int64, the set bits of each segment
// compress_values    weight (rows, n), bits, offsets     -> values (kept,)
// decompress_values  bits, values, offsets               -> weight (rows, n), 0 elsewhere
//
// Little bit order: entry 8b + i of a row is bit i of its byte b.

#include <torch/csrc/stable/library.h>
#include <segments.cuh>

#include <vector>

#include "pack.cuh"

namespace {

using namespace fedspa;
using namespace fedspa::bitmask;

// A warp counts a segment.
__global__ void __launch_bounds__(BLOCK)
    count_segments(const uint8_t* __restrict__ bits, Segments segments, int64_t number_of_segments,
                   int64_t* __restrict__ counts) {
  const int64_t number = thread_number() / 32;
  if (number >= number_of_segments) {
    return;
  }
  const Place place = place_of(segments, number);
  unsigned count = 0;
#pragma unroll 4
  for (int word = threadIdx.x % 32; 32 * word < place.length; word += 32) {
    count += __popc(load_bits(bits + place.byte, word, place.length));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    count += __shfl_xor_sync(0xffffffff, count, distance);
  }
  if (threadIdx.x % 32 == 0) {
    counts[number] = count;
  }
}

// A block moves a segment. T is any type of the weight's size. Whatever offsets and bits say,
// nothing beyond the `size` values is read or written.
template <class T>
__global__ void __launch_bounds__(SEGMENT_BLOCK)
    compress_segments(const T* __restrict__ weight, const uint8_t* __restrict__ bits,
                      const int64_t* __restrict__ offsets, Segments segments,
                      T* __restrict__ values, int64_t size) {
  const Place place = place_of(segments, blockIdx.x);
  auto* const index = shared_memory<SegmentIndex>();
  fill_index(index, load_bits(bits + place.byte, threadIdx.x, place.length));
  const int64_t offset = offsets[blockIdx.x];
  for_each_bit(index, [&](int i, bool kept, unsigned value) {
    if (kept && static_cast<uint64_t>(offset + value) < static_cast<uint64_t>(size)) {
      values[offset + value] = weight[place.element + element_of_thread(i)];
    }
  });
}

template <class T>
__global__ void __launch_bounds__(SEGMENT_BLOCK)
    decompress_segments(const uint8_t* __restrict__ bits, const T* __restrict__ values,
                        int64_t size, const int64_t* __restrict__ offsets, Segments segments,
                        T* __restrict__ weight) {
  const Place place = place_of(segments, blockIdx.x);
  auto* const index = shared_memory<SegmentIndex>();
  fill_index(index, load_bits(bits + place.byte, threadIdx.x, place.length));
  const int64_t offset = offsets[blockIdx.x];
  for_each_bit(index, [&](int i, bool kept, unsigned value) {
    const int element = element_of_thread(i);
    if (element < place.length) {
      const bool there = static_cast<uint64_t>(offset + value) < static_cast<uint64_t>(size);
      weight[place.element + element] = kept && there ? values[offset + value] : T{0};
    }
  });
}

int64_t last_size(const char* name, const Tensor& tensor, ScalarType dtype) {
  check_contiguous(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.dim() > 0, name, ": needs one dimension or more");
  return tensor.size(tensor.dim() - 1);
}

// How many pairs of bytes can be moved as one: none where rows end within a byte.
int64_t pairs_of(const Tensor& mask, const Tensor& bits, int64_t n) {
  const bool whole =
      n % 8 == 0 && is_aligned(mask.const_data_ptr(), 16) && is_aligned(bits.const_data_ptr(), 2);
  return whole ? bits.numel() / 2 : 0;
}

Tensor pack_mask(Tensor mask, int64_t stream) {
  const int64_t n = last_size("pack_mask", mask, ScalarType::Bool);
  Tensor bits = with_last_size(mask, (n + 7) / 8, ScalarType::Byte);
  if (bits.numel() > 0) {
    const Rows rows = {n, bits.numel(), Divisor((n + 7) / 8)};
    const int64_t pairs = pairs_of(mask, bits, n);
    launch(Device(mask, stream), &pack_bytes, blocks_for("pack_mask", rows.bytes - pairs, BLOCK),
           BLOCK, 0, data<uint8_t>(mask), rows, pairs, mutable_data<uint8_t>(bits));
  }
  return bits;
}

Tensor unpack_mask(Tensor bits, int64_t n, int64_t stream) {
  const int64_t bytes = last_size("unpack_mask", bits, ScalarType::Byte);
  STD_TORCH_CHECK(n >= 0 && bytes == (n + 7) / 8, "unpack_mask: ", n, " entries need ", (n + 7) / 8,
                  " bytes along the last axis, and there are ", bytes);
  Tensor mask = with_last_size(bits, n, ScalarType::Bool);
  if (mask.numel() > 0) {
    const Rows rows = {n, bits.numel(), Divisor(bytes)};
    const int64_t pairs = pairs_of(mask, bits, n);
    launch(Device(bits, stream), &unpack_bytes,
           blocks_for("unpack_mask", rows.bytes - pairs, BLOCK), BLOCK, 0, data<uint8_t>(bits),
           rows, pairs, mutable_data<uint8_t>(mask));
  }
  return mask;
}

Tensor count_kept(Tensor bits, int64_t n, int64_t segment, int64_t stream) {
  const Segments segments = make_segments("count_kept", n, segment);
  const int64_t rows = check_bits("count_kept", bits, segments);
  const int64_t size = rows * segments.per_row;
  Tensor counts = new_empty(bits, {size}, ScalarType::Long);
  if (size > 0) {
    launch(Device(bits, stream), &count_segments, blocks_for("count_kept", size, BLOCK / 32), BLOCK,
           0, data<uint8_t>(bits), segments, size, mutable_data<int64_t>(counts));
  }
  return counts;
}

Tensor compress_values(Tensor weight, Tensor bits, Tensor offsets, int64_t kept, int64_t segment,
                       int64_t stream) {
  const char* const name = "compress_values";
  check_contiguous(name, weight, weight.scalar_type());
  STD_TORCH_CHECK(weight.dim() == 2 && kept >= 0, name, ": needs weight (rows, n) and kept >= 0");
  const Segments segments = make_segments(name, weight.size(1), segment);
  const int64_t rows = weight.size(0);
  check_rows(name, bits, offsets, rows, segments);
  Tensor values = new_empty(weight, {kept}, weight.scalar_type());
  if (kept > 0) {
    for_element_size(name, weight, [&]<class T>() {
      launch(Device(weight, stream), &compress_segments<T>,
             blocks_for(name, rows * segments.per_row, 1), SEGMENT_BLOCK, sizeof(SegmentIndex),
             data<T>(weight), data<uint8_t>(bits), data<int64_t>(offsets), segments,
             mutable_data<T>(values), kept);
    });
  }
  return values;
}

Tensor decompress_values(Tensor bits, Tensor values, Tensor offsets, int64_t n, int64_t segment,
                         int64_t stream) {
  const char* const name = "decompress_values";
  const Segments segments = make_segments(name, n, segment);
  const int64_t rows = bits.dim() == 2 ? bits.size(0) : -1;
  check_rows(name, bits, offsets, rows, segments);
  check_contiguous(name, values, values.scalar_type());
  Tensor weight = new_empty(values, {rows, n}, values.scalar_type());
  if (rows > 0) {
    for_element_size(name, values, [&]<class T>() {
      launch(Device(values, stream), &decompress_segments<T>,
             blocks_for(name, rows * segments.per_row, 1), SEGMENT_BLOCK, sizeof(SegmentIndex),
             data<uint8_t>(bits), data<T>(values), values.numel(), data<int64_t>(offsets), segments,
             mutable_data<T>(weight));
    });
  }
  return weight;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fedspa_native, FEDSPA_DEVICE, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("count_kept", TORCH_BOX(&count_kept));
  m.impl("compress_values", TORCH_BOX(&compress_values));
  m.impl("decompress_values", TORCH_BOX(&decompress_values));
}
