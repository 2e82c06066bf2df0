// The k smallest of data of any size, exactly, with all threads of the CPU: in general one sample,
// and one pass over the data.

#pragma once

#include <select_in_cache.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace fedspa {

// How many of a chunk's keys lie where to a guessed range [low, high], and those inside it.
template <class Key>
struct Chunk {
  int64_t below = 0;
  int64_t at_low = 0;
  int64_t at_high = 0;
  std::vector<Key> inside;

  // The number of keys that equal `key`, which lies in the range.
  int64_t ties(Key key, Key low, Key high) const {
    return key == low    ? at_low
           : key == high ? at_high
                         : std::count(inside.begin(), inside.end(), key);
  }
};

// The unit of work, small enough that one of them may be read a second time to find a tie.
constexpr int64_t CHUNK = 32768;

// The number of keys that load() is asked for at most; they stay in the first-level cache.
constexpr int64_t LOADED = 1024;

template <class Key, class Load>
FEDSPA_INLINE void look_through(Chunk<Key>& chunk, int64_t begin, int64_t end, Key low, Key high,
                                const Load& load) {
  Key keys[LOADED];
  for (; begin < end; begin += LOADED) {
    const int64_t size = std::min(LOADED, end - begin);
    load(begin, size, keys);
    Key below = 0;
    Key at_low = 0;
    Key at_high = 0;
    for (int64_t i = 0; i < size; ++i) {
      below += keys[i] < low;
      at_low += keys[i] == low;
      at_high += keys[i] == high;
    }
    chunk.below += below;
    chunk.at_low += at_low;
    chunk.at_high += low == high ? 0 : at_high;
    if (high - 1 > low) {
      for_each_between<Key>(keys, size, low, high - 1, [&](int64_t i) FEDSPA_BODY {
        chunk.inside.push_back(keys[i]);
        return true;
      });
    }
  }
}

// A sample of n^(2/3) keys guesses a range that holds the k-th smallest, four standard deviations
// to either side, and little else. One key of each stretch of the data, at a place that no pattern
// in the data follows.
template <class Key, class Load>
Bracket<Key> guess_range(int64_t n, int64_t k, const Load& load) {
  const auto size = static_cast<int64_t>(std::pow(std::cbrt(static_cast<double>(n)), 2));
  const auto sample = std::make_unique_for_overwrite<Key[]>(size);
  Key* const keys = sample.get();
  torch::stable::parallel_for(0, size, 4096, [=, &load](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stretch = n / size;
      const uint64_t hash = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15 >> 32;
      load(n % size * i / size + i * stretch + static_cast<int64_t>(hash % stretch), 1, keys + i);
    }
  });
  const double rank = static_cast<double>(k) / static_cast<double>(n) * static_cast<double>(size);
  const auto spread = static_cast<int64_t>(2 * std::sqrt(static_cast<double>(size))) + 1;
  const int64_t lower = static_cast<int64_t>(rank) - spread;
  const int64_t upper = static_cast<int64_t>(rank) + spread;
  Bracket<Key> range;
  vectorised([=, &range]() FEDSPA_BODY {
    range.low = lower < 1 ? range.low : select_in_cache(keys, size, lower).last;
    range.high = upper >= size ? range.high : select_in_cache(keys, size, upper).last;
  });
  return range;
}

template <class Key, class Load>
std::vector<Chunk<Key>> look_through_all(int64_t n, const Bracket<Key>& range, const Load& load) {
  std::vector<Chunk<Key>> chunks((n + CHUNK - 1) / CHUNK);
  Chunk<Key>* const first = chunks.data();
  for_ranges(chunks.size(), 1, [=](int64_t begin, int64_t end) FEDSPA_BODY {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stop = std::min(n, (i + 1) * CHUNK);
      look_through(first[i], i * CHUNK, stop, range.low, range.high, load);
    }
  });
  return chunks;
}

// All chunks as one.
template <class Key>
Chunk<Key> sum(const std::vector<Chunk<Key>>& chunks) {
  Chunk<Key> total;
  for (const Chunk<Key>& chunk : chunks) {
    total.below += chunk.below;
    total.at_low += chunk.at_low;
    total.at_high += chunk.at_high;
    total.inside.insert(total.inside.end(), chunk.inside.begin(), chunk.inside.end());
  }
  return total;
}

// A key, and how many of those that equal it are selected.
template <class Key>
struct Threshold {
  Key key;
  int64_t room;
};

// The threshold of the k smallest of a chunk, which is not among those below its range.
template <class Key>
Threshold<Key> find_threshold(const Chunk<Key>& chunk, const Bracket<Key>& range, int64_t k) {
  const auto inside = static_cast<int64_t>(chunk.inside.size());
  const int64_t rank = k - chunk.below - chunk.at_low;
  if (rank <= 0) {
    return {range.low, rank + chunk.at_low};
  }
  if (rank > inside) {
    return {range.high, rank - inside};
  }
  Threshold<Key> threshold;
  vectorised([=, keys = chunk.inside.data(), &threshold]() FEDSPA_BODY {
    // Of all of them the last is the largest; select_in_cache would only say "all".
    const Key last = rank == inside ? *std::max_element(keys, keys + inside)
                                    : select_in_cache(keys, inside, rank).last;
    threshold = {last, rank - count_up_to<Key>(keys, inside, last - 1)};
  });
  return threshold;
}

// Returns the index behind the count-th of the entries begin to end that equals `tied`.
template <class Key, class Load>
int64_t behind_tie(int64_t begin, int64_t end, Key tied, int64_t count, const Load& load) {
  const auto keys = std::make_unique_for_overwrite<Key[]>(end - begin);
  int64_t cut = 0;
  vectorised([=, keys = keys.get(), &cut]() FEDSPA_BODY {
    load(begin, end - begin, keys);
    cut = begin + behind_tie(keys, end - begin, tied, count);
  });
  return cut;
}

// Selects the k smallest of n keys. load(begin, size, keys) writes those of the entries begin to
// begin + size; all threads call it, and it should be FEDSPA_BODY and capture by value.
template <class Key, class Load>
Selected<Key> select_smallest(int64_t n, int64_t k, const Load& load) {
  if (k == 0 || k == n) {
    return none_or_all<Key>(n, k);
  }
  using limits = std::numeric_limits<Key>;
  Bracket<Key> range = n > CHUNK ? guess_range<Key>(n, k, load) : Bracket<Key>{};
  std::vector<Chunk<Key>> chunks = look_through_all(n, range, load);
  Chunk<Key> total = sum(chunks);
  // A guess that failed is still a bound: the second range is certain.
  const int64_t up_to_high = total.below + total.at_low + std::ssize(total.inside) + total.at_high;
  if (k <= total.below || k > up_to_high) {
    range = k <= total.below ? Bracket<Key>{limits::min(), range.low}
                             : Bracket<Key>{range.high, limits::max()};
    chunks = look_through_all(n, range, load);
    total = sum(chunks);
  }
  auto [last, room] = find_threshold(total, range, k);
  int64_t begin = 0;
  for (const Chunk<Key>& chunk : chunks) {
    const int64_t ties = chunk.ties(last, range.low, range.high);
    if (room <= ties) {
      break;
    }
    room -= ties;
    begin += CHUNK;
  }
  return {last, behind_tie(begin, std::min(n, begin + CHUNK), last, room, load)};
}

} // namespace fedspa
