#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastdiff::emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr uint64_t kCanary = 0x5AFE57ACC0FFEE11;

// Where threads wait for each other. An ended thread is waited for no longer.
struct Barrier {
  explicit Barrier(const char* name) : name(name) {}
  const char* name;
  unsigned members = 0;
  std::vector<struct Fiber*> waiting;
};

struct Warp {
  Barrier barrier{"a warp's barrier or shuffle"};
  unsigned lanes = 0;
  alignas(16) unsigned char values[2][kLanes][16];
};

struct Block {
  Barrier barrier{"__syncthreads"};
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  unsigned running = 0;
};

struct Fiber : Thread {
  ucontext_t context;
  char* stack = nullptr;
  uint64_t turn = 0;  // of those that can run, the highest does
};

// Who runs first: any thread, or the threads of one block (or warp) before those of the others, so
// that one is as far ahead as barriers allow.
enum class Favour { kNobody, kBlocks, kWarps };

struct Scheduler {
  Grid grid;
  const std::function<void()>* kernel;
  std::mt19937_64 order;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> ready;  // a heap by turn
  Favour favour;
  Barrier cluster{"the cluster's barrier"};
  Fiber* running = nullptr;
  ucontext_t context;
  std::string failure;
#ifdef __SANITIZE_ADDRESS__
  const void* own_stack = nullptr;
  size_t own_stack_bytes = 0;
#endif

  void run_cluster(uint64_t first_block, char* stacks);
  void make_ready(Fiber* fiber);
  Fiber& next();
  void start(Block& block, uint64_t linear, char*& stack);
  void resume(Fiber& fiber);
  void suspend(bool ended);
  void wait(Barrier& barrier);
  void leave(Barrier& barrier);
  void release(Barrier& barrier);
  void end_of(Fiber& fiber);
  void fail(const std::string& what);
};

namespace {

std::mutex one_launch;
Scheduler* scheduler = nullptr;
uint64_t order_seed = 0;
uint64_t launches = 0;
unsigned most_blocks = 0;

void poison(void* memory, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, bytes);
#else
  std::memset(memory, 0xFF, bytes);
#endif
}

void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

// Stacks of a cluster's fibers, kept from launch to launch; pages count when they are touched.
char* stacks_for(size_t fibers) {
  static char* stacks = nullptr;
  static size_t bytes = 0;
  if (fibers * kStackBytes > bytes) {
    if (stacks) munmap(stacks, bytes);
    bytes = fibers * kStackBytes;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<char*>(memory);
  }
  return stacks;
}

void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler->own_stack, &scheduler->own_stack_bytes);
#endif
  (*scheduler->kernel)();
  scheduler->suspend(true);
}

std::string at(const Thread& thread) {
  return "thread " + std::to_string(thread.index.x) + " of block (" +
         std::to_string(thread.block_index.x) + ", " + std::to_string(thread.block_index.y) + ")";
}

}  // namespace

Thread& current() { return *scheduler->running; }
const Grid& grid() { return scheduler->grid; }
void sync_block() { scheduler->wait(current().block->barrier); }
void sync_cluster() { scheduler->wait(scheduler->cluster); }
void* shared_memory() { return current().block->shared; }

void* shared_memory_of(void* mine, unsigned rank) {
  const Block& block = *current().block;
  const auto offset = static_cast<size_t>(static_cast<unsigned char*>(mine) - block.shared);
  if (rank >= scheduler->blocks.size() || offset >= block.shared_bytes) {
    scheduler->fail("no shared memory of block " + std::to_string(rank) + " at offset " +
                    std::to_string(offset));
  }
  return scheduler->blocks[rank].shared + offset;
}

void exchange(void* value, size_t size, unsigned source) {
  Thread& thread = current();
  Warp& warp = *thread.warp;
  auto& values = warp.values[thread.exchanges++ % 2];
  if (size > 16 || source >= kLanes || warp.lanes != kLanes) {
    scheduler->fail("a shuffle that needs 32 lanes met " + std::to_string(warp.lanes));
  }
  std::memcpy(values[thread.lane], value, size);
  scheduler->wait(warp.barrier);
  std::memcpy(value, values[source], size);
}

void Scheduler::resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block_index;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&context, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void Scheduler::suspend(bool ended) {
  Fiber& fiber = *running;
  if (ended) end_of(fiber);
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack, own_stack, own_stack_bytes);
#endif
  swapcontext(&fiber.context, &context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &own_stack, &own_stack_bytes);
#endif
}

void Scheduler::wait(Barrier& barrier) {
  barrier.waiting.push_back(running);
  release(barrier);
  suspend(false);
}

void Scheduler::leave(Barrier& barrier) {
  --barrier.members;
  release(barrier);
}

void Scheduler::release(Barrier& barrier) {
  if (barrier.waiting.size() < barrier.members) return;
  for (Fiber* fiber : barrier.waiting) make_ready(fiber);
  barrier.waiting.clear();
}

void Scheduler::end_of(Fiber& fiber) {
  uint64_t canary;
  std::memcpy(&canary, fiber.stack, sizeof canary);
  if (canary != kCanary) failure = at(fiber) + " overran its stack";
  Block& block = *fiber.block;
  --fiber.warp->lanes;
  leave(fiber.warp->barrier);
  leave(block.barrier);
  leave(cluster);
  if (--block.running == 0) poison(block.shared, block.shared_bytes);
}

// From within a fiber: the cluster goes no further.
void Scheduler::fail(const std::string& what) {
  failure = at(*running) + ": " + what;
  suspend(false);
}

void Scheduler::start(Block& block, uint64_t linear, char*& stack) {
  const unsigned threads = grid.threads.x;
  block.shared_bytes = grid.shared_bytes;
  // At least one byte, so that every block has an address of its own.
  if (posix_memalign(reinterpret_cast<void**>(&block.shared), 128, grid.shared_bytes + 1)) abort();
  std::memset(block.shared, 0xFF, grid.shared_bytes);
  poison(block.shared + grid.shared_bytes, 1);
  block.warps = std::vector<Warp>((threads + kLanes - 1) / kLanes);
  block.barrier.members = block.running = threads;
  uint64_t turn = order();
  for (unsigned i = 0; i < threads; ++i) {
    if (favour == Favour::kWarps && i % kLanes == 0) turn = order();
    Fiber fiber;
    fiber.turn = turn;
    fiber.index = dim3(i, 0, 0);
    fiber.block_index = dim3(static_cast<unsigned>(linear % grid.blocks.x),
                             static_cast<unsigned>(linear / grid.blocks.x), 0);
    fiber.lane = i % kLanes;
    fiber.block = &block;
    fiber.warp = &block.warps[i / kLanes];
    ++fiber.warp->lanes;
    ++fiber.warp->barrier.members;
    fiber.stack = stack;
    stack += kStackBytes;
    fibers.push_back(fiber);
  }
}

bool later(const Fiber* a, const Fiber* b) { return a->turn < b->turn; }

void Scheduler::make_ready(Fiber* fiber) {
  const uint64_t any = order() >> 32;
  fiber->turn = favour == Favour::kNobody ? any : (fiber->turn >> 32 << 32) | any;
  ready.push_back(fiber);
  std::push_heap(ready.begin(), ready.end(), later);
}

Fiber& Scheduler::next() {
  std::pop_heap(ready.begin(), ready.end(), later);
  Fiber& fiber = *ready.back();
  ready.pop_back();
  return fiber;
}

void Scheduler::run_cluster(uint64_t first_block, char* stacks) {
  blocks = std::vector<Block>(grid.cluster);
  fibers.clear();
  fibers.reserve(grid.cluster * grid.threads.x);
  ready.clear();
  cluster.waiting.clear();
  cluster.members = grid.cluster * grid.threads.x;
  favour = static_cast<Favour>(order() % 3);
  for (unsigned rank = 0; rank < grid.cluster; ++rank) {
    start(blocks[rank], first_block + rank, stacks);
  }
  for (Fiber& fiber : fibers) {
    std::memcpy(fiber.stack, &kCanary, sizeof kCanary);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    make_ready(&fiber);
  }
  while (!ready.empty() && failure.empty()) resume(next());
  const auto stuck = [&](const Barrier& barrier) {
    if (failure.empty() && !barrier.waiting.empty()) {
      failure = at(*barrier.waiting.front()) + " and " +
                std::to_string(barrier.waiting.size() - 1) + " more wait at " + barrier.name +
                " for " + std::to_string(barrier.members - barrier.waiting.size()) +
                " threads that never come";
    }
  };
  stuck(cluster);
  for (Block& block : blocks) {
    stuck(block.barrier);
    for (Warp& warp : block.warps) stuck(warp.barrier);
    unpoison(block.shared, block.shared_bytes + 1);
    std::free(block.shared);
  }
}

std::string run(const Grid& grid, const std::function<void()>& kernel) {
  std::lock_guard<std::mutex> lock(one_launch);
  Scheduler mine;
  mine.grid = grid;
  mine.kernel = &kernel;
  mine.order.seed(order_seed + launches++);
  scheduler = &mine;
  blockDim = grid.threads;
  gridDim = grid.blocks;
  const size_t fibers = static_cast<size_t>(grid.cluster) * grid.threads.x;
  char* stacks = stacks_for(fibers);
  std::vector<uint64_t> clusters(static_cast<uint64_t>(grid.blocks.x) * grid.blocks.y /
                                 grid.cluster);
  for (uint64_t i = 0; i < clusters.size(); ++i) clusters[i] = i * grid.cluster;
  std::shuffle(clusters.begin(), clusters.end(), mine.order);
  for (const uint64_t first : clusters) {
    if (mine.failure.empty()) mine.run_cluster(first, stacks);
  }
  if (!mine.failure.empty()) unpoison(stacks, fibers * kStackBytes);
  scheduler = nullptr;
  return mine.failure;
}

void set_order(uint64_t seed) {
  order_seed = seed;
  launches = 0;
}

void limit_grid(unsigned blocks) { most_blocks = blocks; }

// --- The runtime's part ------------------------------------------------------------------------

namespace {

constexpr size_t kSharedByDefault = 48 << 10;
constexpr unsigned kPortableCluster = 8;

struct Allowed {
  size_t shared = kSharedByDefault;
  unsigned cluster = kPortableCluster;
};

std::map<const void*, Allowed> allowed;
std::string last_words;

}  // namespace

cudaError_t allow(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    allowed[kernel].cluster = value ? static_cast<unsigned>(device.cluster) : kPortableCluster;
    return cudaSuccess;
  }
  if (value < 0 || value > device.shared_bytes) return cudaErrorInvalidValue;
  allowed[kernel].shared = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config,
                   const std::function<void()>& body) {
  Grid grid = {config.gridDim, config.blockDim, 1, config.dynamicSmemBytes};
  for (unsigned i = 0; i < config.numAttrs; ++i) grid.cluster = config.attrs[i].val.clusterDim.x;
  const Allowed limits = allowed[kernel];
  const bool possible =
      grid.blocks.x > 0 && grid.blocks.y > 0 && grid.blocks.y < 65536 && grid.blocks.z == 1 &&
      grid.threads.x > 0 && grid.threads.x <= 1024 && grid.threads.y == 1 && grid.threads.z == 1 &&
      grid.shared_bytes <= limits.shared && grid.cluster > 0 && grid.cluster <= limits.cluster &&
      grid.shared_bytes <= static_cast<size_t>(device.shared_bytes) &&
      grid.cluster <= device.cluster && grid.blocks.x % grid.cluster == 0;
  if (!possible) return cudaErrorInvalidConfiguration;
  if (most_blocks > 0 && grid.cluster == 1) {
    grid.blocks.x = std::min(grid.blocks.x, most_blocks);
    grid.blocks.y = std::min(grid.blocks.y, most_blocks);
  }
  last_words = run(grid, body);
  return last_words.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace fastdiff::emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return fastdiff::emulation::last_words.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
