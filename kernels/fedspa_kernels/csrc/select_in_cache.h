// The k smallest of an array of keys, exactly, on one thread of the CPU, without a sort. The array
// should fit the cache. Keys are integers (order.h), and never the least value of their type.

#pragma once

#include <cpu.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace fedspa {

// What is selected: every key below `last`, and what equals it before the index `cut`. So key <=
// last before the cut and key <= last - 1 after it.
template <class Key>
struct Selected {
  Key last;
  int64_t cut;
};

// Keys (low, high], and how many there are up to either end; the k-th smallest is among them.
template <class Key>
struct Bracket {
  Key low = std::numeric_limits<Key>::min();
  Key high = std::numeric_limits<Key>::max();
  int64_t up_to_low = 0;
  int64_t up_to_high = 0;

  int64_t inside() const { return up_to_high - up_to_low; }
  uint64_t width() const { return static_cast<uint64_t>(high) - static_cast<uint64_t>(low); }
};

static_assert(std::endian::native == std::endian::little,
              "flag i of a word must be its i-th lowest byte");

// Calls take(i) for each key in (low, high], in the order of i, for as long as it returns true.
template <class Key, class Take>
FEDSPA_INLINE void for_each_between(const Key* keys, int64_t n, Key low, Key high,
                                    const Take& take) {
  constexpr int64_t BLOCK = 512;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t size = std::min(BLOCK, n - begin);
    uint8_t flags[BLOCK];
    for (int64_t i = 0; i < size; ++i) {
      flags[i] = (keys[begin + i] > low) & (keys[begin + i] <= high);
    }
    for (int64_t i = 0; i < size; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, flags + i, std::min<int64_t>(8, size - i));
      for (; word != 0; word &= word - 1) {
        if (!take(begin + i + std::countr_zero(word) / 8)) {
          return;
        }
      }
    }
  }
}

template <class Key>
FEDSPA_INLINE int64_t count_up_to(const Key* keys, int64_t n, Key pivot) {
  // A counter as wide as the keys keeps the loop in vectors; a block keeps it from overflowing.
  constexpr int64_t BLOCK = 1 << 20;
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = std::min(n, begin + BLOCK);
    Key count = 0;
    for (int64_t i = begin; i < end; ++i) {
      count += keys[i] <= pivot;
    }
    total += count;
  }
  return total;
}

// Moves both ends to keys that are there. Without it, many equal keys would take a bisection of
// all the values around them. As distances from an end, without a sign, what lies outside of the
// bracket is farther than what lies inside, so that a minimum needs no test.
template <class Key>
FEDSPA_INLINE void tighten(Bracket<Key>& bracket, const Key* keys, int64_t n) {
  using Distance = std::make_unsigned_t<Key>;
  const auto first = static_cast<Distance>(bracket.low) + 1;
  const auto last = static_cast<Distance>(bracket.high);
  Distance from_first = std::numeric_limits<Distance>::max();
  Distance from_last = std::numeric_limits<Distance>::max();
  for (int64_t i = 0; i < n; ++i) {
    // Not std::min: its reference keeps GCC from vectorising the loop.
    const Distance up = static_cast<Distance>(keys[i]) - first;
    const Distance down = last - static_cast<Distance>(keys[i]);
    from_first = up < from_first ? up : from_first;
    from_last = down < from_last ? down : from_last;
  }
  bracket.low = static_cast<Key>(first + from_first - 1);
  bracket.high = static_cast<Key>(last - from_last);
}

// Cuts the bracket at this share of its width, and keeps the part that holds the k-th smallest.
template <class Key>
FEDSPA_INLINE void split(Bracket<Key>& bracket, const Key* keys, int64_t n, int64_t k,
                         double share) {
  const uint64_t width = bracket.width();
  const double aim = std::clamp(share, 0.0, 1.0) * static_cast<double>(width);
  const auto step = std::clamp<uint64_t>(static_cast<uint64_t>(aim), 1, width - 1);
  const Key pivot = static_cast<Key>(static_cast<uint64_t>(bracket.low) + step);
  const int64_t up_to = count_up_to(keys, n, pivot);
  if (up_to >= k) {
    bracket.high = pivot;
    bracket.up_to_high = up_to;
  } else {
    bracket.low = pivot;
    bracket.up_to_low = up_to;
  }
}

// So few keys are looked at one by one.
constexpr int64_t FEW = 32;

template <class Key>
FEDSPA_INLINE bool is_narrow(const Bracket<Key>& bracket) {
  return bracket.inside() <= FEW || bracket.width() == 1;
}

// Counting the keys up to a pivot is the cheapest pass that there is. Interpolation finds the
// pivots, aiming a little above and a little below the k-th in turn, so that both ends close in;
// where that fails to halve the bracket, bisection takes over.
template <class Key>
FEDSPA_INLINE Bracket<Key> narrow_bracket(const Key* keys, int64_t n, int64_t k) {
  Bracket<Key> bracket;
  bracket.up_to_high = n;
  if (!is_narrow(bracket)) {
    tighten(bracket, keys, n);
  }
  while (!is_narrow(bracket)) {
    const int64_t before = bracket.inside();
    for (const double side : {1.0, -1.0}) {
      if (!is_narrow(bracket)) {
        const auto inside = static_cast<double>(bracket.inside());
        const double rank = static_cast<double>(k - bracket.up_to_low) + side * std::sqrt(inside);
        split(bracket, keys, n, k, rank / inside);
      }
    }
    if (bracket.inside() > before / 2) {
      tighten(bracket, keys, n);
      if (!is_narrow(bracket)) {
        split(bracket, keys, n, k, 0.5);
      }
    }
  }
  return bracket;
}

// Returns the index behind the count-th key that equals `tied`.
template <class Key>
FEDSPA_INLINE int64_t behind_tie(const Key* keys, int64_t n, Key tied, int64_t count) {
  int64_t cut = n;
  for_each_between<Key>(keys, n, tied - 1, tied, [&](int64_t i) FEDSPA_BODY {
    cut = i + 1;
    return --count > 0;
  });
  return cut;
}

// 0 or n of n keys.
template <class Key>
Selected<Key> none_or_all(int64_t n, int64_t k) {
  using limits = std::numeric_limits<Key>;
  return k == 0 ? Selected<Key>{limits::min() + 1, 0} : Selected<Key>{limits::max(), n};
}

template <class Key>
FEDSPA_INLINE Selected<Key> select_in_cache(const Key* keys, int64_t n, int64_t k) {
  if (k == 0 || k == n) {
    return none_or_all<Key>(n, k);
  }
  const Bracket<Key> bracket = narrow_bracket(keys, n, k);
  Key last = bracket.high;
  int64_t below = bracket.up_to_low;
  int64_t ties = bracket.inside();
  if (bracket.width() > 1) {
    Key few[FEW] = {};
    int64_t size = 0;
    for_each_between(keys, n, bracket.low, bracket.high, [&](int64_t i) FEDSPA_BODY {
      few[size++] = keys[i];
      return true;
    });
    std::nth_element(few, few + (k - below - 1), few + size);
    last = few[k - below - 1];
    ties = std::count(few, few + size, last);
    below += count_up_to<Key>(few, size, last - 1);
  }
  const int64_t room = k - below;
  return {last, room == ties ? n : behind_tie(keys, n, last, room)};
}

} // namespace fedspa
