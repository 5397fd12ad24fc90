// How a group_norm_silu call is cut into blocks: a pure function of its shape and of the device.
//
// A slab is a run of whole groups of one sample: channels [c, c + slab_channels) at every position.
// Its parts are blocks. Where all parts of a slab fit into the shared memory of one cluster, x (and
// dy) are read once ("resident"); where they do not, a first kernel reads them for the sums and a
// second one again, a few slabs at a time, so that it finds them in the L2 cache.
//
// Planar slabs are one group, or a few small ones, so that a block has work; slabs of channels_last
// tensors are as many groups as make full memory lines of 128 bytes, or less where these would not
// fit. Parts cut the positions, and in groups of very many channels also the channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/group_norm_silu.h"
#include "device_limits.h"

namespace fastdiff::cuda {

struct GroupNormTile {
  bool wide;      // accesses of 16 bytes; else of one element
  bool resident;  // one read
  int threads;
  int lanes;  // threads that share a row of packs: a channel's positions, or a position's channels
  int teams;  // partial sums of a channel in a block
  int parts;  // of a slab: position_parts · channel_parts
  int position_parts;
  int channel_parts;
  int part_channels;
  int64_t part_positions;
  int64_t slab_channels;
  int64_t slabs;
  int64_t slabs_of_sample;
  int64_t slabs_at_once;  // in one launch
  int64_t group_channels;
  int64_t held_at;     // bytes of shared memory before the tensors' shares that it holds
  int64_t held_bytes;  // of one tensor's share
  int64_t shared_bytes;
  int64_t workspace_floats;
  int64_t bytes_moved;  // of tensors of x's size, in sectors; those that L2 serves included
};

// Floats of shared memory for each channel, each partial sum of a channel, and each group.
struct GroupNormFloats {
  int channel, sum, group;
};
constexpr GroupNormFloats kForwardFloats = {4, 2, 3};
constexpr GroupNormFloats kBackwardFloats = {8, 3, 1};

namespace tile_detail {

constexpr int64_t kWorthABlock = 16 << 10;     // bytes; smaller parts are not cut for more blocks
constexpr int64_t kHalfAProcessor = 96 << 10;  // bytes: two such blocks share a multiprocessor

inline int64_t divided_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
inline int64_t rounded_up(int64_t value, int64_t unit) { return divided_up(value, unit) * unit; }

inline int power_of_two(int64_t at_least, int64_t at_most) {
  int power = 1;
  while (power < at_least && power < at_most) power *= 2;
  return power;
}

struct Request {
  const GroupNormShape& shape;
  const DeviceLimits& device;
  bool backward;
  int64_t item;     // bytes
  int64_t width;    // channels of a group
  int64_t tensors;  // that are read: x, dy, a residual

  // Of a part: their coefficients and sums live in shared memory.
  int64_t most_channels() const { return power_of_two(device.shared_bytes / 128, 2048); }
  int64_t wanted_blocks() const { return 2 * device.multiprocessors; }
  int64_t elements_in_access(bool wide) const { return wide ? kAccessBytes / item : 1; }
};

// One way to cut: slabs of `groups` groups, in `parts` or a few less; `at_once`: slabs in a launch.
inline GroupNormTile cut(const Request& r, bool wide, int64_t groups, int64_t parts,
                         int64_t at_once) {
  const bool last = r.shape.channels_last;
  const int64_t vec = r.elements_in_access(wide);
  GroupNormTile tile = {};
  tile.wide = wide;
  tile.slab_channels = groups * r.width;
  tile.group_channels = r.width;
  tile.slabs_of_sample = r.shape.groups / groups;
  tile.slabs = r.shape.samples * tile.slabs_of_sample;
  tile.slabs_at_once = at_once;
  tile.part_channels = static_cast<int>(std::min(tile.slab_channels, r.most_channels()));
  tile.channel_parts = static_cast<int>(divided_up(tile.slab_channels, tile.part_channels));
  tile.part_positions = rounded_up(divided_up(r.shape.positions, parts), last ? 1 : vec);
  tile.position_parts = static_cast<int>(divided_up(r.shape.positions, tile.part_positions));
  tile.parts = tile.position_parts * tile.channel_parts;

  const int64_t packs = tile.part_positions * tile.part_channels / vec;
  // Smaller blocks spend less on what every thread does once; larger ones where they are few.
  const bool four_fit = r.tensors * packs * vec * r.item <= kHalfAProcessor / 2 &&
                        at_once * tile.parts >= 2 * r.wanted_blocks();
  tile.threads = packs < 1024 || four_fit ? 128 : 256;
  const int64_t row_packs = (last ? tile.part_channels : tile.part_positions) / vec;
  if (last) {
    tile.lanes = power_of_two(row_packs, tile.threads);
    tile.teams = tile.threads / std::max(tile.lanes, 32);
  } else {
    // Those of a line; more where each still has a few packs of the row.
    const int64_t line_packs = wide ? kLineBytes / kAccessBytes : 32;
    const int64_t wanted = std::max(divided_up(row_packs, 4), std::min(row_packs, line_packs));
    tile.lanes = power_of_two(wanted, 32);
    tile.teams = 1;
    const int rows_at_once = tile.threads / tile.lanes;
    while (tile.teams * tile.part_channels < rows_at_once && tile.teams * tile.lanes < row_packs) {
      tile.teams *= 2;
    }
  }
  const GroupNormFloats& floats = r.backward ? kBackwardFloats : kForwardFloats;
  const int64_t groups_of_part = divided_up(tile.part_channels, r.width);
  tile.held_at =
      rounded_up(4 * (tile.part_channels * (floats.channel + int64_t{floats.sum} * tile.teams) +
                      groups_of_part * floats.group),
                 kAccessBytes);
  tile.held_bytes = rounded_up(tile.part_positions * tile.part_channels * r.item, kAccessBytes);
  return tile;
}

// The fewest groups that accesses of `vec` elements divide and whose rows have `bytes`.
inline int64_t groups_of_line(const Request& r, int64_t vec, int64_t bytes) {
  for (int64_t groups = 1; groups < r.shape.groups; ++groups) {
    const int64_t channels = groups * r.width;
    if (r.shape.groups % groups == 0 && channels % vec == 0 && channels * r.item >= bytes) {
      return groups;
    }
  }
  return r.shape.groups;
}

// Planar: one group, or as many small ones as leave enough blocks.
inline int64_t planar_groups(const Request& r) {
  const int64_t group_bytes = r.width * r.shape.positions * r.item;
  const int64_t all = r.shape.samples * r.shape.groups;
  int64_t groups = 1;
  while (r.shape.groups % (2 * groups) == 0 && groups * group_bytes < kWorthABlock / 2 &&
         all / (2 * groups) >= 2 * r.wanted_blocks()) {
    groups *= 2;
  }
  return groups;
}

// The smallest cluster that holds a slab well: two blocks to a multiprocessor, and no fewer blocks
// than those can take. Or false.
inline bool cut_to_fit(const Request& r, bool wide, int64_t groups, GroupNormTile* tile) {
  if (groups * r.width > r.most_channels()) return false;
  bool found = false;
  for (int64_t parts = 1; parts <= r.device.cluster; parts *= 2) {
    if (parts > kPortableCluster && found) break;  // larger ones only for slabs that need them
    const GroupNormTile tried =
        cut(r, wide, groups, parts, r.shape.samples * (r.shape.groups / groups));
    const int64_t held = r.tensors * tried.held_bytes;
    if (tried.held_at + held > r.device.shared_bytes) continue;
    if (tried.parts > kPortableCluster && tried.parts != parts) continue;  // 16, or what all can
    *tile = tried;
    tile->resident = found = true;
    tile->shared_bytes = tried.held_at + held;
    const bool few_blocks = tried.slabs * tried.parts < r.wanted_blocks();
    if (held <= kHalfAProcessor && !(few_blocks && held > kWorthABlock)) break;
  }
  return found;
}

// Launches of as many slabs as half the L2 cache holds, which are cut into as many parts as the device
// runs together, or a few less: those beyond would wait until a multiprocessor is free.
inline GroupNormTile cut_for_two_reads(const Request& r, bool wide) {
  const bool last = r.shape.channels_last;
  int64_t groups = last ? groups_of_line(r, r.elements_in_access(wide), kLineBytes) : 1;
  if (groups * r.width > r.most_channels()) {  // only a single group's channels can be cut
    groups = 1;
    wide = wide && (!last || r.width % r.elements_in_access(wide) == 0);
  }
  const int64_t slabs = r.shape.samples * (r.shape.groups / groups);
  const int64_t slab_bytes = groups * r.width * r.shape.positions * r.item;
  const int64_t fit =
      std::clamp<int64_t>(r.device.l2_bytes / 2 / (slab_bytes * r.tensors), 1, slabs);
  const int64_t at_once = divided_up(slabs, divided_up(slabs, fit));
  int64_t parts = std::clamp<int64_t>(2 * slab_bytes / kWorthABlock, 1,
                                      std::max<int64_t>(1, r.wanted_blocks() / at_once));

  // The forward's first kernel holds its part, for the deviations from its mean.
  const auto shared = [&](const GroupNormTile& tile) {
    return tile.held_at + (r.backward ? 0 : r.tensors * tile.held_bytes);
  };
  GroupNormTile tile = cut(r, wide, groups, parts, at_once);
  while (shared(tile) > std::min(kHalfAProcessor, r.device.shared_bytes) &&
         parts < r.shape.positions) {
    parts *= 2;
    tile = cut(r, wide, groups, parts, at_once);
  }
  tile.shared_bytes = shared(tile);
  tile.workspace_floats =
      tile.slabs_at_once * (r.backward ? 3 * tile.slab_channels * tile.position_parts + 2 * groups
                                       : 3 * groups * tile.parts);
  return tile;
}

// What one pass over a tensor moves: whole sectors, also where a slab's row of channels has parts of
// them.
inline int64_t bytes_of_a_tensor(const Request& r, const GroupNormTile& tile) {
  const int64_t rows = r.shape.samples * r.shape.positions;
  if (!r.shape.channels_last) return rows * r.shape.channels * r.item;
  int64_t sectors = 0;
  for (int64_t first = 0; first < r.shape.channels; first += tile.slab_channels) {
    const int64_t end = std::min(first + tile.slab_channels, r.shape.channels);
    sectors += divided_up(end * r.item, kSectorBytes) - first * r.item / kSectorBytes;
  }
  return rows * sectors * kSectorBytes;
}

}  // namespace tile_detail

// aligned: every tensor of x's size starts at a multiple of 16 bytes.
inline GroupNormTile group_norm_tile(const GroupNormShape& shape, const DeviceLimits& device,
                                     bool backward, bool aligned) {
  using namespace tile_detail;
  const bool last = shape.channels_last;
  const int64_t item = bytes_of(shape.dtype);
  const int64_t tensors = (backward ? 2 : 1) + (shape.add == Add::kResidual ? 1 : 0);
  const Request r = {shape, device, backward, item, shape.channels / shape.groups, tensors};
  const int64_t vec = r.elements_in_access(true);
  const bool wide = aligned && (last ? shape.channels : shape.positions) % vec == 0;

  GroupNormTile tile;
  bool resident = false;
  if (last) {
    for (const int line : {kLineBytes, kLineBytes / 2, kLineBytes / 4}) {
      const int64_t groups = groups_of_line(r, r.elements_in_access(wide), line);
      resident = resident || cut_to_fit(r, wide, groups, &tile);
    }
  } else {
    resident = cut_to_fit(r, wide, planar_groups(r), &tile);
  }
  if (!resident) tile = cut_for_two_reads(r, wide);
  if (backward) tile.workspace_floats += 3 * shape.samples * shape.channels;
  const int64_t most_blocks =
      INT32_MAX / std::max<int64_t>(tile.parts, tile.slab_channels / r.width);
  tile.slabs_at_once = std::min(tile.slabs_at_once, most_blocks);
  const int64_t passes = (tile.resident ? 1 : 2) * tensors + 1;
  tile.bytes_moved = passes * bytes_of_a_tensor(r, tile);
  return tile;
}

}  // namespace fastdiff::cuda
