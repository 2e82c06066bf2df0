// Groups of consecutive entries of which the smallest are selected: patterns n:m, rows, layers.

#pragma once

#include <cpu.h>
#include <select.h>
#include <select_in_cache.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace fedspa {

// `Entries` is what a family does with its tensors. Both are FEDSPA_BODY, and called from all
// threads with any range that lies in the tensors:
//   bool load(begin, size, Key* keys)                    the keys; true where a value is refused
//   void store(begin, size, const Key* keys, Key last)   what is selected: keys[i] <= last

// About as many entries as are worth a thread of their own.
constexpr int64_t ENTRIES_PER_TASK = 16384;

// In so small a group, each key is compared with each other.
constexpr int64_t SMALL_GROUP = 64;

// Keys of a group of so many entries stay in the second-level cache.
constexpr int64_t LARGE_GROUP = 131072;

// The rank of each key in its group of `of` is the number of keys before it that are not larger,
// and of keys behind it that are smaller. place[i] = i % of. There are `of` readable keys before
// the first and behind the last, which the places leave out.
template <class Key>
FEDSPA_INLINE void rank_keys(const Key* keys, const Key* place, int64_t size, int64_t of,
                             Key* ranks) {
  std::fill(ranks, ranks + size, 0);
  for (Key apart = 1; apart < of; ++apart) {
    const Key* before = keys - apart;
    const Key* behind = keys + apart;
    const Key first_without = static_cast<Key>(of) - apart;
    for (int64_t i = 0; i < size; ++i) {
      ranks[i] += ((place[i] >= apart) & (before[i] <= keys[i])) +
                  ((place[i] < first_without) & (behind[i] < keys[i]));
    }
  }
}

template <class Key, class Entries>
FEDSPA_INLINE bool select_in_small_groups(int64_t begin, int64_t end, int64_t of, int64_t count,
                                          const Entries& entries) {
  constexpr int64_t BLOCK = 1024;
  const int64_t whole = BLOCK / of * of;
  Key keys[BLOCK + 2 * SMALL_GROUP] = {};
  Key place[BLOCK];
  Key ranks[BLOCK];
  for (int64_t i = 0; i < whole; ++i) {
    place[i] = static_cast<Key>(i % of);
  }
  bool refused = false;
  for (; begin < end; begin += whole) {
    const int64_t size = std::min(whole, end - begin);
    refused |= entries.load(begin, size, keys + SMALL_GROUP);
    rank_keys(keys + SMALL_GROUP, place, size, of, ranks);
    entries.store(begin, size, ranks, static_cast<Key>(count - 1));
  }
  return refused;
}

// Stores the entries begin to begin + size, of which the first `cut` may be `last`.
template <class Key, class Entries>
FEDSPA_INLINE void store_selected(const Entries& entries, int64_t begin, int64_t size,
                                  const Key* keys, Selected<Key> selected) {
  const int64_t cut = std::clamp<int64_t>(selected.cut, 0, size);
  entries.store(begin, cut, keys, selected.last);
  entries.store(begin + cut, size - cut, keys + cut, selected.last - 1);
}

// Groups begin to end, whose keys fit the cache, one after the other.
template <class Key, class Entries>
FEDSPA_INLINE bool select_in_rows(int64_t begin, int64_t end, int64_t of, int64_t count, Key* keys,
                                  const Entries& entries) {
  bool refused = false;
  for (int64_t group = begin; group < end; ++group) {
    refused |= entries.load(group * of, of, keys);
    store_selected(entries, group * of, of, keys, select_in_cache(keys, of, count));
  }
  return refused;
}

// One group of any size, from memory, with all threads.
template <class Key, class Entries>
bool select_in_layer(int64_t begin, int64_t of, int64_t count, const Entries& entries) {
  const Selected<Key> selected =
      select_smallest<Key>(of, count, [=](int64_t at, int64_t size, Key* keys) FEDSPA_BODY {
        entries.load(begin + at, size, keys);
      });
  std::atomic<bool> refused = false;
  for_ranges(of, ENTRIES_PER_TASK, [=, &refused](int64_t from, int64_t to) FEDSPA_BODY {
    Key keys[LOADED];
    bool wrong = false;
    for (int64_t at = from; at < to; at += LOADED) {
      const int64_t size = std::min(LOADED, to - at);
      wrong |= entries.load(begin + at, size, keys);
      store_selected(entries, begin + at, size, keys, {selected.last, selected.cut - at});
    }
    if (wrong) {
      refused = true;
    }
  });
  return refused;
}

inline void check_groups(const char* name, const Tensor& tensor, int64_t of, int64_t count) {
  const int64_t n = tensor.numel();
  STD_TORCH_CHECK(n == 0 || (of > 0 && n % of == 0 && count >= 0 && count <= of), name,
                  ": needs groups of a length that divides the entries, and no more to go");
}

// Selects the `count` smallest of each of the groups, runs of `of` of n entries; of ties, the
// first. Returns whether a value was refused; what was stored is then nothing.
template <class Key, class Entries>
bool select_in_groups(int64_t n, int64_t of, int64_t count, const Entries& entries) {
  if (n == 0) {
    return false;
  }
  const int64_t groups = n / of;
  const bool few = groups < torch::stable::get_num_threads() && of > CHUNK;
  std::atomic<bool> refused = false;
  if (of > LARGE_GROUP || few) {
    for (int64_t begin = 0; begin < n; begin += of) {
      if (select_in_layer<Key>(begin, of, count, entries)) {
        refused = true;
      }
    }
    return refused;
  }
  const int64_t grain = std::max<int64_t>(1, ENTRIES_PER_TASK / of);
  torch::stable::parallel_for(0, groups, grain, [=, &refused](int64_t begin, int64_t end) {
    const auto keys = std::make_unique_for_overwrite<Key[]>(of);
    vectorised([=, keys = keys.get(), &refused]() FEDSPA_BODY {
      const bool wrong = of <= SMALL_GROUP
                             ? select_in_small_groups<Key>(begin * of, end * of, of, count, entries)
                             : select_in_rows<Key>(begin, end, of, count, keys, entries);
      if (wrong) {
        refused = true;
      }
    });
  });
  return refused;
}

} // namespace fedspa
