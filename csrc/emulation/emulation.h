// A CUDA device made of fibers, so that the kernels of csrc/cuda/ run on a machine without a GPU:
// the same sources, compiled by the host's C++ compiler with this folder in place of CUDA's headers.
//
// Every thread of a block, and of every block of a cluster, is a fiber. The scheduler runs one at a
// time until it meets a barrier (of its warp, block or cluster) or ends. Which one is next is chosen
// at random, and in two clusters of three one block or warp runs ahead of the others; so a missing
// barrier shows as a wrong or a different number in some run, and a barrier that not all
// threads reach as an error that names it. Shared memory is allocated to the byte and starts as
// NaN; with AddressSanitizer its ends are guarded, and so is the memory of a block that has ended
// and that a neighbour in the cluster still reads.
//
// What it cannot show:
//   memory ordering   a write is seen at once by all; a missing fence between barriers goes unseen
//   races of blocks   clusters run one after the other, in random order, not at the same time
//   approximations    __expf and its kind are the C library's exact functions
//   speed, occupancy, registers: the compile reports of tests/csrc/test_cuda_reports.py see to some
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastdiff::emulation {

struct Block;
struct Warp;

struct Thread {
  dim3 index;
  dim3 block_index;
  unsigned lane;
  unsigned exchanges = 0;  // shuffles so far, of which the parity chooses the buffer
  Block* block = nullptr;
  Warp* warp = nullptr;
};

// What a launch asks for; the scheduler checks it as a device does.
struct Grid {
  dim3 blocks;
  dim3 threads;
  unsigned cluster;
  size_t shared_bytes;
};

Thread& current();
const Grid& grid();

// Each returns when all threads of the block or cluster have called it.
void sync_block();
void sync_cluster();

void* shared_memory();                              // of the running thread's block
void* shared_memory_of(void* mine, unsigned rank);  // the same place in another block's

// The 16 bytes that lane `source` brings to this exchange; every lane of the warp takes part.
void exchange(void* value, size_t size, unsigned source);

// What the device has; launches that ask for more are refused. A small one makes small tensors take
// the paths of large ones.
struct Device {
  int64_t multiprocessors = 2;
  int64_t shared_bytes = 227 << 10;  // of a block, when asked for
  int64_t cluster = 16;              // blocks, when asked for
  int64_t l2_bytes = 1 << 20;
};
inline Device device;

// Runs the grid; the empty string, or what went wrong.
std::string run(const Grid& grid, const std::function<void()>& kernel);

// Grids without clusters are cut to this many blocks in x and in y; 0: none is. Kernels that stride
// over their work then take all of it in few blocks.
void limit_grid(unsigned blocks);

// The order in which fibers run follows from this; a different one for every launch after it.
void set_order(uint64_t seed);

}  // namespace fastdiff::emulation
