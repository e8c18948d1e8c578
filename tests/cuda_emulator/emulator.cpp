// The threads of a CUDA block as fibers of one CPU thread.
//
// A thread runs until it has to wait for others (barrier, warp collective) and hands over; who goes on is up to the order
// that the test set. Memory that kernels share is poisoned before every block, so whoever reads before it was written
// finds NaN. A kernel that lacks a barrier gives other results, or NaN, in one order or another.

#include <cuda_runtime.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace sparsecod::emulator {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr int POISON = 0xff;  // NaN in every floating-point type

enum Order { FORWARD, REVERSE, SHUFFLED };
enum Exit { YIELDED = 1, FAILED };

struct Copy {
  void* shared;
  const void* global;
  size_t bytes, zeros;
};

struct Thread {
  dim3 index;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const uint64_t* waits_for = nullptr;  // goes on once this is at least `target`
  uint64_t target = 0;
  uint64_t collectives = 0;
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  const char* kind = nullptr;
  size_t size = 0;
  unsigned arrived = 0;
  uint64_t completed = 0;
  unsigned char lanes[2][32 * LANE_BYTES];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint64_t barriers = 0;
  size_t live = 0, at_barrier = 0;
  void (*body)(void*);
  void* captured;
};

Order order = FORWARD;
std::mt19937 random_order;
std::string message;
Block* block = nullptr;
Thread* current = nullptr;
sigjmp_buf scheduler;
std::unordered_map<const void*, size_t> shared_allowed;
alignas(1024) unsigned char shared_memory[SHARED_BYTES];
size_t shared_dynamic = 0;

unsigned char* stack_of(size_t thread) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[thread];
}

void release_barrier_if_full() {
  if (block->at_barrier == block->live && block->live > 0) {
    block->at_barrier = 0;
    ++block->barriers;
  }
}

void run_thread() {
  block->body(block->captured);
  current->done = true;
  --block->live;
  release_barrier_if_full();
  siglongjmp(scheduler, YIELDED);
}

void wait_until(const uint64_t& counter, uint64_t target) {
  if (counter >= target) return;
  current->waits_for = &counter;
  current->target = target;
  if (_setjmp(current->resume) == 0) siglongjmp(scheduler, YIELDED);
}

// Lets a thread go on until it waits or ends. False if the kernel failed.
bool go_on(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  thread.waits_for = nullptr;
  switch (sigsetjmp(scheduler, 0)) {
    case 0:
      if (current->started) _longjmp(current->resume, 1);
      current->started = true;
      setcontext(&current->start);
      return false;  // not reached
    case FAILED:
      return false;
    default:
      return true;
  }
}

template <typename T>
void arrange(std::vector<T>& items) {
  if (order == REVERSE) std::reverse(items.begin(), items.end());
  if (order == SHUFFLED) std::shuffle(items.begin(), items.end(), random_order);
}

bool run_block(dim3 size, void (*body)(void*), void* captured) {
  Block here;
  block = &here;
  here.body = body;
  here.captured = captured;
  here.live = size.x * size.y * size.z;
  here.threads.resize(here.live);
  here.warps.resize((here.live + warpSize - 1) / warpSize);
  for (size_t i = 0; i < here.threads.size(); ++i) {
    Thread& thread = here.threads[i];
    thread.index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack_of(i);
    thread.start.uc_stack.ss_size = STACK_BYTES;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, run_thread, 0);
  }
  std::memset(shared_memory, POISON, sizeof(shared_memory));
  std::vector<size_t> turns(here.live);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == REVERSE) arrange(turns);
  while (here.live > 0) {
    if (order == SHUFFLED) arrange(turns);
    bool stuck = true;
    for (size_t i : turns) {
      Thread& thread = here.threads[i];
      if (thread.done || (thread.waits_for && *thread.waits_for < thread.target)) continue;
      stuck = false;
      if (!go_on(thread)) return false;
    }
    if (stuck) {
      message = "threads of a block wait for others that never come: some have left, or stand at another barrier";
      return false;
    }
  }
  return true;
}

void on_bad_access(int, siginfo_t* info, void*) {
  char text[128];
  snprintf(text, sizeof(text), "touches memory outside its tensors, at %p", info->si_addr);
  message = text;
  siglongjmp(scheduler, FAILED);
}

// Answers a bad access with a failed launch for as long as it lives.
class BadAccessGuard {
 public:
  BadAccessGuard() {
    struct sigaction action = {};
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~BadAccessGuard() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_, bus_;
};

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  message = text;
  siglongjmp(scheduler, FAILED);
}

void block_barrier() {
  const uint64_t target = block->barriers + 1;
  ++block->at_barrier;
  release_barrier_if_full();
  wait_until(block->barriers, target);
}

const unsigned char* exchange(const char* kind, unsigned mask, const void* mine, size_t size) {
  const size_t thread = current - block->threads.data();
  Warp& warp = block->warps[thread / warpSize];
  const unsigned lane = thread % warpSize;
  if (block->threads.size() % warpSize != 0) fail("%s in a block of %zu threads, no multiple of 32", kind, block->threads.size());
  if (mask != ~0u) fail("%s with mask %#x: the emulator knows whole warps only", kind, mask);
  if (warp.arrived != 0 && (std::strcmp(warp.kind, kind) != 0 || warp.size != size)) {
    fail("lanes of one warp diverge: one is at %s, others at %s", kind, warp.kind);
  }
  warp.kind = kind;
  warp.size = size;
  unsigned char* lanes = warp.lanes[current->collectives & 1];
  if (size > 0) std::memcpy(lanes + lane * LANE_BYTES, mine, size);
  warp.arrived |= 1u << lane;
  if (warp.arrived == ~0u) {
    warp.arrived = 0;
    ++warp.completed;
  }
  wait_until(warp.completed, ++current->collectives);
  return lanes;
}

void* static_shared(size_t size) {
  if (size > SHARED_BYTES_UNASKED) fail("%zu bytes of static shared memory, at most %zu can be had", size, SHARED_BYTES_UNASKED);
  return shared_memory;
}

void* dynamic_shared() { return shared_memory + SHARED_BYTES - shared_dynamic; }

void copy_async(void* shared, const void* global, size_t bytes, size_t zeros) {
  current->uncommitted.push_back({shared, global, bytes, zeros});
}

void commit_copies() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void wait_for_copies(int groups_still_under_way) {
  const size_t arrived = std::max<int64_t>(0, static_cast<int64_t>(current->groups.size()) - groups_still_under_way);
  for (size_t i = 0; i < arrived; ++i) {
    for (const Copy& copy : current->groups[i]) {
      std::memcpy(copy.shared, copy.global, copy.bytes);
      std::memset(static_cast<unsigned char*>(copy.shared) + copy.bytes, 0, copy.zeros);
    }
  }
  current->groups.erase(current->groups.begin(), current->groups.begin() + arrived);
}

void allow_shared(const void* kernel, size_t bytes) { shared_allowed[kernel] = bytes; }

cudaError_t launch(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* captured) {
  const auto allowed = shared_allowed.find(kernel);
  message.clear();
  if (shared_bytes > SHARED_BYTES || shared_bytes > (allowed == shared_allowed.end() ? SHARED_BYTES_UNASKED : allowed->second)) {
    message = std::to_string(shared_bytes) + " bytes of dynamic shared memory were not asked for with cudaFuncSetAttribute";
  }
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z, threads = size.x * size.y * size.z;
  if (blocks == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535) message = "the grid or the block has no such size";
  if (!message.empty()) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = size;
  shared_dynamic = (shared_bytes + 1023) / 1024 * 1024;
  std::vector<size_t> turns(blocks);
  std::iota(turns.begin(), turns.end(), 0);
  arrange(turns);
  const BadAccessGuard guard;
  for (size_t i : turns) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    if (!run_block(size, body, captured)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace sparsecod::emulator

extern "C" {

// In which order threads and blocks take turns: 0 forward, 1 reverse, more: shuffled by this seed.
void sparsecod_emulator_set_order(unsigned order) {
  using namespace sparsecod::emulator;
  sparsecod::emulator::order = order > 1 ? SHUFFLED : static_cast<Order>(order);
  random_order.seed(order);
}

// Why the last launch failed; empty if it did not.
const char* sparsecod_emulator_message() { return sparsecod::emulator::message.c_str(); }
}
