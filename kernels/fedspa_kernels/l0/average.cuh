// The averages of l0/cuda.cu: every client is read once, sums and votes stay in registers.

#pragma once

#include <grid.cuh>
#include <neighbours.cuh>
#include <segments.cuh>

namespace fedspa::l0 {

constexpr int AVERAGE_BLOCK = 256; // threads
// Clients whose weights a thread asks for before it adds the first of them.
constexpr int IN_FLIGHT = 4;

// The clients' tensors on the device, one list after the other.
template <class T>
__device__ const T* pointer(const int64_t* table, int number) {
  return reinterpret_cast<const T*>(table[number]);
}

template <class T>
__device__ T divided(float total, int votes) {
  return from_float<T>(votes > 0 ? __fdiv_rn(total, static_cast<float>(votes)) : 0.0f);
}

// N neighbours of a few clients, as they were read: taken apart at once, they would need a register
// for each of their elements, and each load would be waited for before the next one.
template <class T, int N>
struct Clients {
  Word<Pack<T, N>> weights[IN_FLIGHT];
  Word<Pack<bool, N>> masks[IN_FLIGHT];
};

// Reads N neighbours from `start` of the clients from `first`, as many as there are.
template <bool MASKED, int N, class T>
__device__ void read_clients(const int64_t* table, int clients, int first, int64_t start,
                             Clients<T, N>& read) {
#pragma unroll
  for (int i = 0; i < IN_FLIGHT; ++i) {
    if (first + i < clients) {
      const T* const weight = pointer<T>(table, first + i) + start;
      read.weights[i] = load_constant_word(reinterpret_cast<const Pack<T, N>*>(weight));
      if constexpr (MASKED) {
        const bool* const mask = pointer<bool>(table, clients + first + i) + start;
        read.masks[i] = load_constant_word(reinterpret_cast<const Pack<bool, N>*>(mask));
      }
    }
  }
}

template <bool MASKED, int N, class T>
__device__ void average_at(const int64_t* table, int clients, int64_t start, T* average,
                           int* votes) {
  float total[N] = {};
  Pack<int, N> sums = {};
  for (int first = 0; first < clients; first += IN_FLIGHT) {
    Clients<T, N> read;
    read_clients<MASKED, N>(table, clients, first, start, read);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      if (first + i < clients) {
        const auto weight = from_word<Pack<T, N>>(read.weights[i]);
        Pack<bool, N> mask;
        if constexpr (MASKED) {
          mask = from_word<Pack<bool, N>>(read.masks[i]);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float value = to_float(weight.at[j]);
          const bool kept = MASKED ? mask.at[j] : value != 0.0f;
          total[j] = kept ? __fadd_rn(total[j], value) : total[j];
          sums.at[j] += kept;
        }
      }
    }
  }
  Pack<T, N> mean;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    mean.at[j] = divided<T>(total[j], sums.at[j]);
  }
  *reinterpret_cast<Pack<T, N>*>(average + start) = mean;
  *reinterpret_cast<Pack<int, N>*>(votes + start) = sums;
}

// The first `packs` threads take N neighbours each, and the others one.
template <bool MASKED, int N, class T>
__global__ void __launch_bounds__(AVERAGE_BLOCK)
    average_clients(const int64_t* __restrict__ table, int clients, int64_t packs, int64_t n,
                    T* __restrict__ average, int* __restrict__ votes) {
  const int64_t number = thread_number();
  const int64_t single = number + packs * (N - 1);
  if (number < packs) {
    average_at<MASKED, N, T>(table, clients, number * N, average, votes);
  } else if (single < n) {
    average_at<MASKED, 1, T>(table, clients, single, average, votes);
  }
}

// A block averages a segment of a row. The table has the clients' bits, values and offsets, and how
// many values there are: none beyond them is read, whatever the bits and offsets say.
template <class T>
__global__ void __launch_bounds__(SEGMENT_BLOCK)
    average_segments(const int64_t* __restrict__ table, int clients, Segments segments,
                     T* __restrict__ average, int* __restrict__ votes) {
  const Place place = place_of(segments, blockIdx.x);
  const auto load_client = [&](int client) {
    return load_bits(pointer<uint8_t>(table, client) + place.byte, threadIdx.x, place.length);
  };
  float total[WORDS_PER_WARP] = {};
  int sums[WORDS_PER_WARP] = {};
  unsigned word = load_client(0);
  for (int client = 0; client < clients; ++client) {
    // By turns, so that no thread overwrites what a slower one still reads.
    SegmentIndex* const index = shared_memory<SegmentIndex>() + client % 2;
    fill_index(index, word);
    if (client + 1 < clients) {
      word = load_client(client + 1);
    }
    const T* const values = pointer<T>(table, clients + client);
    const int64_t offset =
        load_constant(pointer<int64_t>(table, 2 * clients + client) + blockIdx.x);
    const auto size = static_cast<uint64_t>(table[3 * clients + client]);
    for_each_bit(index, [&](int i, bool kept, unsigned value) {
      if (kept) {
        const bool there = static_cast<uint64_t>(offset + value) < size;
        const float weight = there ? to_float(load_constant(values + offset + value)) : 0.0f;
        total[i] = __fadd_rn(total[i], weight);
        ++sums[i];
      }
    });
  }
#pragma unroll
  for (int i = 0; i < WORDS_PER_WARP; ++i) {
    const int element = element_of_thread(i);
    if (element < place.length) {
      average[place.element + element] = divided<T>(total[i], sums[i]);
      votes[place.element + element] = sums[i];
    }
  }
}

} // namespace fedspa::l0
