// The averages of l0/cpu.cpp, a chunk of the result at a time.

#pragma once

#include <bits.h>

#include <algorithm>
#include <vector>

namespace fedspa::l0 {

// Elements: sums, votes and one client's weights are 24 KiB. A multiple of 8, for bits.
constexpr int64_t CHUNK = 2048;

// What is asked of memory at once, a fraction of a chunk: more requests would wait for one another.
constexpr int64_t PART = 256;

// What a client did not keep may be NaN: its bits are cleared, where a product would keep it.
FEDSPA_INLINE float kept_or_zero(float value, uint32_t kept) {
  return float_of(float_bits(value) & (0u - kept));
}

// By its bits, since a comparison takes a subnormal number for 0 where PyTorch flushes them.
FEDSPA_INLINE uint32_t not_zero(float value) {
  return (float_bits(value) << 1) != 0;
}

// Adds a client: sums += m * w, votes += m. No mask means m = (w != 0).
template <class T>
FEDSPA_INLINE void add_client(const T* weight, const uint8_t* mask, int64_t n, float* sums,
                              int32_t* votes) {
  if (mask == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const float value = to_float(weight[i]);
      sums[i] += value;
      votes[i] += not_zero(value);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t kept = mask[i] != 0;
      sums[i] += kept_or_zero(to_float(weight[i]), kept);
      votes[i] += kept;
    }
  }
}

// Where nobody voted the sum is 0, and any divisor but 0 will do.
template <class T>
FEDSPA_INLINE void divide(const float* sums, const int32_t* votes, int64_t n, T* average) {
  for (int64_t i = 0; i < n; ++i) {
    // Not std::max: its reference keeps GCC from vectorising the loop.
    const int32_t divisor = votes[i] > 0 ? votes[i] : 1;
    average[i] = from_float<T>(sums[i] / static_cast<float>(divisor));
  }
}

// The clients' weights and masks (or none) of n elements each.
template <class T>
struct Clients {
  const T* const* weights;
  const uint8_t* const* masks;
  int64_t count;
  int64_t n;

  FEDSPA_INLINE const uint8_t* mask(int64_t client, int64_t at) const {
    return masks == nullptr ? nullptr : masks[client] + at;
  }

  // Asks memory for the part of the chunk at `at` that follows: the next client's, or the first
  // one's in the next chunk. The hardware foresees no jump between clients; this doubles the speed.
  FEDSPA_INLINE void prefetch(int64_t client, int64_t at) const {
    const int64_t next = client + 1 < count ? client + 1 : 0;
    at += next == 0 ? CHUNK : 0;
    if (at + PART > n) {
      return;
    }
    for (int64_t i = 0; i < PART; i += 64 / sizeof(T)) {
      __builtin_prefetch(weights[next] + at + i);
    }
    for (int64_t i = 0; masks != nullptr && i < PART; i += 64) {
      __builtin_prefetch(masks[next] + at + i);
    }
  }
};

template <class T>
FEDSPA_INLINE void average_chunk(const Clients<T>& clients, int64_t at, T* average,
                                 int32_t* votes) {
  const int64_t size = std::min(CHUNK, clients.n - at);
  float sums[CHUNK] = {};
  std::fill_n(votes + at, size, 0);
  for (int64_t client = 0; client < clients.count; ++client) {
    for (int64_t part = 0; part < size; part += PART) {
      clients.prefetch(client, at + part);
      add_client(clients.weights[client] + at + part, clients.mask(client, at + part),
                 std::min(PART, size - part), sums + part, votes + at + part);
    }
  }
  divide(sums, votes + at, size, average + at);
}

// The clients of one dtype in compressed form, (rows, n) each.
template <class T>
struct CompressedClients {
  const std::vector<const uint8_t*>& bits;
  const std::vector<const T*>& values;
  const std::vector<const int64_t*>& offsets;
  const std::vector<int64_t>& kept;
  int64_t rows;
  int64_t n;
  int64_t segment;
};

// Adds a client's next n elements: those that have a bit, from its run.
template <class T>
void add_compressed(const uint8_t* bits, int64_t n, Run<const T>& run, float* sums,
                    int32_t* votes) {
  int64_t done = 0;
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::AVX512) {
    done = add_lanes(bits, n, run, sums, votes);
  }
#endif
  if (done < n) {
    T weight[PART];
    uint8_t mask[PART];
    expand(bits + done / 8, n - done, run, weight);
    vectorised([=, &weight, &mask]() FEDSPA_BODY {
      unpack_bits(bits + done / 8, n - done, mask);
      add_client(weight, mask, n - done, sums + done, votes + done);
    });
  }
}

// Adds a client's part of a chunk, and asks memory for the next client's meanwhile: as many values
// as this one has had, since nobody knows better.
template <class T>
void add_and_prefetch(const uint8_t* bits, int64_t size, Run<const T>& run,
                      const Run<const T>& next_run, const uint8_t* next_bits, float* sums,
                      int32_t* votes) {
  const T* const first = run.next;
  for (int64_t part = 0; part < size; part += PART) {
    const int64_t before = run.next - first;
    add_compressed(bits + part / 8, std::min(PART, size - part), run, sums + part, votes + part);
    const T* const asked = next_run.next + before;
    for (int64_t i = 0; i < run.next - first - before; i += 64 / sizeof(T)) {
      __builtin_prefetch(asked + i);
    }
    __builtin_prefetch(next_bits + part / 8);
  }
}

// One segment of one row, chunk by chunk.
template <class T>
void average_segment(const CompressedClients<T>& clients, int64_t index,
                     std::vector<Run<const T>>& runs, T* average, int32_t* votes) {
  const int64_t in_row = (clients.n + clients.segment - 1) / clients.segment;
  const int64_t row = index / in_row;
  const int64_t first = index % in_row * clients.segment;
  const int64_t end = std::min(first + clients.segment, clients.n);
  for (size_t client = 0; client < runs.size(); ++client) {
    runs[client] = run_of(clients.values[client], clients.kept[client], clients.offsets[client],
                          index, clients.rows * in_row);
  }
  for (int64_t at = first; at < end; at += CHUNK) {
    const int64_t size = std::min(CHUNK, end - at);
    const int64_t byte = row * ((clients.n + 7) / 8) + at / 8;
    float sums[CHUNK] = {};
    int32_t* chunk_votes = votes + row * clients.n + at;
    std::fill_n(chunk_votes, size, 0);
    for (size_t client = 0; client < runs.size(); ++client) {
      const size_t next = client + 1 < runs.size() ? client + 1 : 0;
      const uint8_t* next_bits = clients.bits[next] + byte + (next == 0 ? CHUNK / 8 : 0);
      add_and_prefetch(clients.bits[client] + byte, size, runs[client], runs[next], next_bits, sums,
                       chunk_votes);
    }
    T* chunk = average + row * clients.n + at;
    vectorised([=, &sums]() FEDSPA_BODY { divide(sums, chunk_votes, size, chunk); });
  }
}

} // namespace fedspa::l0
