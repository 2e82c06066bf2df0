// Lets the `count` smallest of each group go: exactly, ties to the lower index first. The groups
// are runs of `of` entries, from 1 to 4 billion each, and any number of them.
//
// A Source says what the entries are, and what becomes of them:
//   Key, Element   uint32_t or uint64_t; what has to be kept of an entry until it is stored
//   VECTOR         entries that a thread takes at a time, a power of two
//   KEYS_ON_CHIP   whether a group on chip is held as keys (its elements are read once more), or
//                  as elements (the keys are computed anew for every digit)
//   bits           of a key: the lower ones; what is above is ignored
//   aligned        whether whole vectors of entries can be moved as one; cleared here for groups
//                  that are not whole vectors
//   load(index, valid, elements)          reads `valid` entries
//   keys(index, valid, elements, keys)
//   store(index, valid, elements, goes)   writes what becomes of them; bit j of goes is entry j's
//
// Up to 32 entries    ranked against one another in registers: one read, one write
// On chip             a block for each group: the group is read once into shared memory
// Larger              a grid for all groups, one launch for each digit, another for the marks

#pragma once

#include <grid.cuh>
#include <large_groups.cuh>
#include <neighbours.cuh>
#include <radix.cuh>

#include <type_traits>

namespace fedspa {

// Ranks groups of OF in one thread, which takes N entries.
template <int OF, int N, class Source>
__global__ void __launch_bounds__(256) select_in_thread(const Source source, int64_t n, int count) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (index >= n) {
    return;
  }
  typename Source::Element elements[N];
  typename Source::Key keys[N];
  source.load(index, N, elements);
  source.keys(index, N, elements, keys);
  int ranks[N] = {};
#pragma unroll
  for (int left = 0; left < N; ++left) {
#pragma unroll
    for (int right = left + 1; right < left / OF * OF + OF; ++right) {
      const bool in_order = keys[left] <= keys[right];
      ranks[left] += !in_order;
      ranks[right] += in_order;
    }
  }
  uint32_t goes = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    goes |= static_cast<uint32_t>(ranks[j] < count) << j;
  }
  source.store(index, N, elements, goes);
}

// Ranks groups of up to 32 in warps: an entry a lane, as many whole groups as a warp holds.
template <class Source>
__global__ void __launch_bounds__(256)
    select_in_lanes(const Source source, int64_t groups, int of, int count) {
  const int lane = threadIdx.x % 32, groups_of_warp = 32 / of;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t index = warp * groups_of_warp * of + lane;
  const int valid = lane < groups_of_warp * of && index < groups * of;
  typename Source::Element elements[1] = {};
  typename Source::Key keys[1] = {};
  source.load(index, valid, elements);
  source.keys(index, valid, elements, keys);
  const int first = lane / of * of;
  int rank = 0;
  for (int i = 0; i < of; ++i) {
    // The lanes of the incomplete group at the end of a warp point beyond it.
    const int lane_of_other = (first + i) % 32;
    const typename Source::Key other = __shfl_sync(~0u, keys[0], lane_of_other);
    rank += other < keys[0] || (other == keys[0] && lane_of_other < lane);
  }
  source.store(index, valid, elements, rank < count);
}

// Reads a group into shared memory, as keys or as elements, and counts the first digit meanwhile.
// Begins and ends with a barrier.
template <int WIDTH, class Source, class Held>
__device__ void hold(const Source& source, int64_t first, int n, Workspace<WIDTH>& workspace,
                     Held* held) {
  using Key = typename Source::Key;
  constexpr int VECTOR = Source::VECTOR;
  const auto digit = nth_digit<WIDTH, Key>(source.bits, 0);
  const int copies = workspace.copies_of(digit.width);
  workspace.clear(digit.width);
  __syncthreads();
  for (int offset = threadIdx.x * VECTOR; offset < n; offset += blockDim.x * VECTOR) {
    const int valid = n - offset < VECTOR ? n - offset : VECTOR;
    typename Source::Element elements[VECTOR] = {};
    Key keys[VECTOR] = {};
    source.load(first + offset, valid, elements);
    source.keys(first + offset, valid, elements, keys);
    if constexpr (std::is_same_v<Held, Key>) {
      write(held + offset, VECTOR, true, keys);
    } else {
      write(held + offset, VECTOR, true, elements);
    }
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      if (j < valid) {
        workspace.add(digit.of(keys[j]), copies);
      }
    }
  }
  __syncthreads();
}

// A block selects in one group, held in shared memory.
template <class Source, bool KEYS, int WIDTH>
__global__ void __launch_bounds__(1024)
    select_on_chip(const Source source, int n, uint32_t count, int passes) {
  using Key = typename Source::Key;
  using Element = typename Source::Element;
  using Held = std::conditional_t<KEYS, Key, Element>;
  constexpr int VECTOR = Source::VECTOR;
  // Vectors of 16 bytes, in which neighbouring threads read shared memory without conflicts.
  constexpr int STEP = 16 / sizeof(Held);
  auto& workspace = *shared_memory<Workspace<WIDTH>>();
  auto* const held = reinterpret_cast<Held*>(&workspace + 1);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * n;
  hold(source, first, n, workspace, held);

  const auto fetch = [&](int64_t offset, int valid, Key(&keys)[STEP]) {
    Held here[STEP];
    read(held + offset, STEP, true, here);
    if constexpr (KEYS) {
#pragma unroll
      for (int j = 0; j < STEP; ++j) {
        keys[j] = here[j];
      }
    } else {
      source.keys(first + offset, valid, here, keys);
    }
  };
  Cut<Key> cut{0, count, 0};
  for (int pass = 0; pass < passes; ++pass) {
    const auto digit = nth_digit<WIDTH, Key>(source.bits, pass);
    if (pass > 0) {
      count_digits<STEP>(workspace, digit, cut.key, n, fetch);
    }
    const int copies = workspace.copies_of(digit.width);
    cut = narrow(workspace, digit, cut, [&](int bin) { return workspace.count(bin, copies); });
  }

  const auto visit = [&](int64_t offset, int valid, Element(&elements)[VECTOR],
                         Key(&keys)[VECTOR]) {
    if constexpr (KEYS) {
      read(held + offset, VECTOR, true, keys);
      source.load(first + offset, valid, elements);
    } else {
      read(held + offset, VECTOR, true, elements);
      source.keys(first + offset, valid, elements, keys);
    }
  };
  mark(source, first, n, workspace.warps, cut.key, cut.ties, cut.equal, visit);
}

template <class Source, bool KEYS, int WIDTH>
void launch_on_chip(const Device& device, const Source& source, int64_t groups, int64_t of,
                    int64_t count, unsigned threads, size_t shared_bytes) {
  const int passes = count == 0 ? 0 : (source.bits + WIDTH - 1) / WIDTH;
  launch(device, &select_on_chip<Source, KEYS, WIDTH>, blocks_for("selection", groups, 1), threads,
         shared_bytes, source, static_cast<int>(of), static_cast<uint32_t>(count), passes);
}

// Selects on chip if a group finds room there, and says whether it did.
template <bool KEYS, class Source>
bool select_in_block(const Device& device, const Source& source, int64_t groups, int64_t of,
                     int64_t count) {
  using Held = std::conditional_t<KEYS, typename Source::Key, typename Source::Element>;
  const int64_t vectors = (of + Source::VECTOR - 1) / Source::VECTOR;
  const size_t held = vectors * Source::VECTOR * sizeof(Held);
  // One warp, with histograms as small as its row.
  if (of <= 1024) {
    static_assert(sizeof(Workspace<8>) + 1024 * sizeof(Held) <= SMALLEST_SHARED_LIMIT);
    launch_on_chip<Source, KEYS, 8>(device, source, groups, of, count, 32,
                                    sizeof(Workspace<8>) + held);
    return true;
  }
  const size_t shared_bytes = sizeof(Workspace<LARGE_WIDTH>) + held;
  // Beyond, a grid for a single group is better than one block.
  if (of > 65536 || shared_bytes > shared_limit(device)) {
    return false;
  }
  const unsigned threads = of <= 8192 ? 256 : of <= 16384 ? 512 : 1024;
  launch_on_chip<Source, KEYS, LARGE_WIDTH>(device, source, groups, of, count, threads,
                                            shared_bytes);
  return true;
}

// Groups of OF, in threads that take whole vectors if there are only whole ones.
template <int OF, class Source>
void launch_in_threads(const Device& device, const Source& source, int64_t n, int64_t count) {
  constexpr int VECTOR = OF < Source::VECTOR ? Source::VECTOR : OF;
  const bool whole = n % VECTOR == 0;
  const auto kernel =
      whole ? &select_in_thread<OF, VECTOR, Source> : &select_in_thread<OF, OF, Source>;
  const int64_t entries = 256 * (whole ? VECTOR : OF);
  launch(device, kernel, blocks_for("selection", n, entries), 256, 0, source, n,
         static_cast<int>(count));
}

// Starts the kernels for groups that are not empty, 0 <= count <= of.
template <class Source>
void select_smallest(const Device& device, const Tensor& like, Source source, int64_t groups,
                     int64_t of, int64_t count) {
  if (of == 4) {
    launch_in_threads<4>(device, source, groups * of, count);
    return;
  }
  if (of == 8) {
    launch_in_threads<8>(device, source, groups * of, count);
    return;
  }
  if (of <= 32) {
    source.aligned = false;
    const int64_t groups_of_block = 256 / 32 * (32 / of);
    launch(device, &select_in_lanes<Source>, blocks_for("selection", groups, groups_of_block), 256,
           0, source, groups, static_cast<int>(of), static_cast<int>(count));
    return;
  }
  source.aligned = source.aligned && of % Source::VECTOR == 0;
  if (select_in_block<Source::KEYS_ON_CHIP>(device, source, groups, of, count)) {
    return;
  }
  if constexpr (Source::KEYS_ON_CHIP &&
                sizeof(typename Source::Element) < sizeof(typename Source::Key)) {
    if (select_in_block<false>(device, source, groups, of, count)) {
      return;
    }
  }
  select_large(device, like, source, groups, of, count);
}

} // namespace fedspa
