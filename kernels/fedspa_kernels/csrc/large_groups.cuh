// Selection in groups that are larger than a block's shared memory (see groups.cuh). A group is cut
// into tiles, a block each. A launch for each digit counts its values among the keys that share
// the digits before it; every block finds those anew from the counts of the last launch, so that
// nothing waits for the host. The counts of the last digit are also kept tile by tile: they say how
// many ties lie in the tiles before.

#pragma once

#include <grid.cuh>
#include <radix.cuh>

#include <algorithm>

namespace fedspa {

constexpr int LARGE_WIDTH = 11;
constexpr int LARGE_BINS = 1 << LARGE_WIDTH;
constexpr unsigned LARGE_THREADS = 256;
static_assert(sizeof(Workspace<LARGE_WIDTH>) <= SMALLEST_SHARED_LIMIT);

// How groups are cut into tiles, and what the launches tell one another.
struct Tiles {
  int64_t of; // entries of a group
  int64_t length; // of a tile, whole vectors for every thread
  int64_t tiles; // of a group
  int64_t groups;
  uint32_t count;
  int passes;
  int last_bins; // values of the last digit
  uint32_t* counts; // (passes, groups, LARGE_BINS)
  uint32_t* tile_counts; // (groups * tiles, last_bins), of the last digit
  uint64_t* keys; // (passes, groups): the digits known before each pass
  uint32_t* ties; // (passes, groups): how many of the keys with those digits go
};

// The tile of this block.
struct Tile {
  __device__ explicit Tile(const Tiles& tiles)
      : group(blockIdx.x / tiles.tiles), nth(blockIdx.x - group * tiles.tiles) {
    const int64_t begin = nth * tiles.length;
    index = group * tiles.of + begin;
    n = tiles.of - begin < tiles.length ? tiles.of - begin : tiles.length;
  }

  int64_t group;
  int64_t nth;
  int64_t index; // of its first entry
  int64_t n;
};

// The cut of the tile's group as the digits before `pass` determine it.
template <class Key>
__device__ Cut<Key> cut_before(const Tiles& tiles, const Tile& tile, int pass, int bits,
                               Workspace<LARGE_WIDTH>& workspace) {
  Cut<Key> cut{0, tiles.count, 0};
  if (pass == 0) {
    return cut;
  }
  if (pass > 1) {
    const int64_t at = (pass - 1) * tiles.groups + tile.group;
    cut = {static_cast<Key>(tiles.keys[at]), tiles.ties[at], 0};
  }
  const uint32_t* counts = tiles.counts + ((pass - 1) * tiles.groups + tile.group) * LARGE_BINS;
  const auto digit = nth_digit<LARGE_WIDTH, Key>(bits, pass - 1);
  return narrow(workspace, digit, cut, [&](int bin) { return counts[bin]; });
}

template <class Source>
__global__ void __launch_bounds__(LARGE_THREADS)
    count_tile(const Source source, const Tiles tiles, int pass) {
  using Key = typename Source::Key;
  constexpr int VECTOR = Source::VECTOR;
  auto& workspace = *shared_memory<Workspace<LARGE_WIDTH>>();
  const Tile tile(tiles);
  const Cut<Key> cut = cut_before<Key>(tiles, tile, pass, source.bits, workspace);
  const int64_t at = pass * tiles.groups + tile.group;
  if (tile.nth == 0 && threadIdx.x == 0) {
    tiles.keys[at] = cut.key;
    tiles.ties[at] = cut.ties;
  }
  const auto digit = nth_digit<LARGE_WIDTH, Key>(source.bits, pass);
  const auto fetch = [&](int64_t offset, int valid, Key(&keys)[VECTOR]) {
    typename Source::Element elements[VECTOR];
    source.load(tile.index + offset, valid, elements);
    source.keys(tile.index + offset, valid, elements, keys);
  };
  count_digits<VECTOR>(workspace, digit, cut.key, tile.n, fetch);
  const int copies = workspace.copies_of(digit.width);
  for (int bin = threadIdx.x; bin < 1 << digit.width; bin += blockDim.x) {
    const uint32_t here = workspace.count(bin, copies);
    if (here > 0) {
      atomicAdd(&tiles.counts[at * LARGE_BINS + bin], here);
    }
    if (pass == tiles.passes - 1) {
      tiles.tile_counts[static_cast<int64_t>(blockIdx.x) * tiles.last_bins + bin] = here;
    }
  }
}

// How many of the group's ties with the cut lie in the tiles before this one.
template <class Key>
__device__ uint32_t ties_before(const Tiles& tiles, const Tile& tile, int digit, uint32_t* warps) {
  uint32_t ties = 0, total = 0;
  for (int64_t other = threadIdx.x; other < tile.nth; other += blockDim.x) {
    ties += tiles.tile_counts[(tile.group * tiles.tiles + other) * tiles.last_bins + digit];
  }
  exclusive_sum(ties, warps, total);
  return total;
}

template <class Source>
__global__ void __launch_bounds__(LARGE_THREADS) mark_tile(const Source source, const Tiles tiles) {
  using Key = typename Source::Key;
  constexpr int VECTOR = Source::VECTOR;
  auto& workspace = *shared_memory<Workspace<LARGE_WIDTH>>();
  const Tile tile(tiles);
  const Cut<Key> cut = cut_before<Key>(tiles, tile, tiles.passes, source.bits, workspace);
  uint32_t room = cut.ties, tied = cut.equal;
  if (room < tied) {
    const auto digit = nth_digit<LARGE_WIDTH, Key>(source.bits, tiles.passes - 1);
    const int last = digit.of(cut.key);
    const uint32_t before = ties_before<Key>(tiles, tile, last, workspace.warps);
    room = before < room ? room - before : 0;
    tied = tiles.tile_counts[static_cast<int64_t>(blockIdx.x) * tiles.last_bins + last];
  }
  const auto visit = [&](int64_t offset, int valid, typename Source::Element(&elements)[VECTOR],
                         Key(&keys)[VECTOR]) {
    source.load(tile.index + offset, valid, elements);
    source.keys(tile.index + offset, valid, elements, keys);
  };
  mark(source, tile.index, tile.n, workspace.warps, cut.key, room, tied, visit);
}

template <class Source>
void select_large(const Device& device, const Tensor& like, const Source& source, int64_t groups,
                  int64_t of, int64_t count) {
  STD_TORCH_CHECK(of <= UINT32_MAX, "a group of ", of,
                  " entries is too large for one GPU; split it");
  // Eight blocks share a multiprocessor, and a tile is worth its histogram.
  const int64_t blocks = 8 * static_cast<int64_t>(multiprocessors(device));
  const int64_t step = LARGE_THREADS * Source::VECTOR;
  const int64_t wanted = std::clamp<int64_t>((blocks + groups - 1) / groups, 1, (of + 8191) / 8192);
  const int64_t steps = ((of + wanted - 1) / wanted + step - 1) / step;
  const int64_t length = steps * step;
  const int64_t tiles = (of + length - 1) / length;
  const int passes = count == 0 ? 0 : (source.bits + LARGE_WIDTH - 1) / LARGE_WIDTH;
  const int last_bins = passes == 0 ? 0 : 1 << (source.bits - (passes - 1) * LARGE_WIDTH);
  const Tensor counts = torch::stable::new_zeros(
      like, std::vector<int64_t>{passes, groups, LARGE_BINS}, ScalarType::Int);
  const Tensor tile_counts = new_empty(like, {groups * tiles, last_bins}, ScalarType::Int);
  const Tensor keys = new_empty(like, {passes, groups}, ScalarType::Long);
  const Tensor ties = new_empty(like, {passes, groups}, ScalarType::Int);
  const Tiles plan{of,
                   length,
                   tiles,
                   groups,
                   static_cast<uint32_t>(count),
                   passes,
                   last_bins,
                   mutable_data<uint32_t>(counts),
                   mutable_data<uint32_t>(tile_counts),
                   mutable_data<uint64_t>(keys),
                   mutable_data<uint32_t>(ties)};
  const dim3 grid = blocks_for("selection", groups * tiles, 1);
  for (int pass = 0; pass < passes; ++pass) {
    launch(device, &count_tile<Source>, grid, dim3(LARGE_THREADS), sizeof(Workspace<LARGE_WIDTH>),
           source, plan, pass);
  }
  launch(device, &mark_tile<Source>, grid, dim3(LARGE_THREADS), sizeof(Workspace<LARGE_WIDTH>),
         source, plan);
}

} // namespace fedspa
