// The threads of a CUDA block as fibers of one CPU thread.
//
// A thread runs until it has to wait for others (barrier, warp collective) and hands over; who goes on is up to the
// order that the test set. Memory that kernels share is poisoned before every block, so whoever reads before it was
// written finds NaN. A kernel that lacks a barrier gives other results, or NaN, in one order or another.
//
// Not seen: two threads that update one place without an atomic (each update is whole here), a missing __threadfence,
// and blocks that wait for each other (blocks run one after the other: such a kernel never ends).

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
#include <unordered_map>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace sparsecod::emulator {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr int POISON = 0xff;  // NaN in every floating-point type

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t SHARED_ALIGNMENT = 1024;
constexpr size_t SHARED_CAPACITY = (SHARED_BYTES + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
constexpr size_t SIGNAL_STACK_BYTES = 64 << 10;

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
  Site barrier_site = {};
  void (*body)(void*);
  void* captured;
};

Order order = FORWARD;
std::mt19937 random_order;
char message[512];
Block* block = nullptr;
Thread* current = nullptr;
sigjmp_buf scheduler;
std::unordered_map<const void*, size_t> shared_allowed;

__attribute__((format(printf, 1, 2))) void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
}

// Memory between two pages that nobody may touch.
unsigned char* guarded(size_t bytes) {
  const size_t total = bytes + 2 * PAGE_BYTES;
  void* memory = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  unsigned char* usable = static_cast<unsigned char*>(memory) + PAGE_BYTES;
  if (mprotect(usable, bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  return usable;
}

unsigned char* stack_of(size_t thread) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= thread) stacks.push_back(guarded(STACK_BYTES));
  return stacks[thread];
}

// A block's shared memory: what is declared with a size lies at the start, what the launch asked for at the end. The
// rest keeps its poison, or the kernel has written past one of them.
struct Shared {
  unsigned char* const memory = guarded(SHARED_CAPACITY);
  size_t dynamic_bytes = 0, dynamic_allowed = 0, static_bytes = 0;
  int static_line = 0;

  unsigned char* dynamic() const {
    return memory + (SHARED_CAPACITY - dynamic_bytes) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
  }
  bool contains(const void* from, size_t bytes) const {
    const unsigned char* first = static_cast<const unsigned char*>(from);
    return (first >= memory && first + bytes <= memory + static_bytes) ||
           (first >= dynamic() && first + bytes <= dynamic() + dynamic_bytes);
  }
  bool rest_is_poison() const {
    const auto poisoned = [](const unsigned char* from, const unsigned char* to) {
      return from == to || (*from == POISON && std::memcmp(from, from + 1, to - from - 1) == 0);
    };
    return poisoned(memory + static_bytes, dynamic()) && poisoned(dynamic() + dynamic_bytes, memory + SHARED_CAPACITY);
  }
} shared;

void release_barrier_if_full() {
  if (block->at_barrier == block->live && block->live > 0) {
    block->at_barrier = 0;
    block->barrier_site = {};
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

enum Progress { STUCK, WENT_ON, BROKE };

// Lets every thread of a warp that can go on do so once, or until a barrier lets other warps go on as well.
Progress run_warp(size_t warp) {
  const size_t first = warp * warpSize;
  std::vector<size_t> turns(std::min<size_t>(warpSize, block->threads.size() - first));
  std::iota(turns.begin(), turns.end(), first);
  arrange(turns);
  const uint64_t barriers = block->barriers;
  Progress progress = STUCK;
  for (size_t i : turns) {
    if (block->barriers != barriers) break;
    Thread& thread = block->threads[i];
    if (thread.done || (thread.waits_for && *thread.waits_for < thread.target)) continue;
    if (!go_on(thread)) return BROKE;
    progress = WENT_ON;
  }
  return progress;
}

bool run_block(dim3 size, void (*body)(void*), void* captured) {
  Block here;
  block = &here;
  here.body = body;
  here.captured = captured;
  here.live = static_cast<size_t>(size.x) * size.y * size.z;
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
  std::memset(shared.memory, POISON, SHARED_CAPACITY);
  shared.static_bytes = 0;
  shared.static_line = 0;
  // A warp goes on as long as it can before the next has its turn: so that it runs ahead of the others wherever
  // nothing holds it back, which warps that keep pace would hide.
  std::vector<size_t> turns(here.warps.size());
  std::iota(turns.begin(), turns.end(), 0);
  arrange(turns);
  while (here.live > 0) {
    if (order == SHUFFLED) arrange(turns);
    Progress progress = STUCK;
    for (size_t i = 0; i < turns.size() && progress == STUCK; ++i) progress = run_warp(turns[i]);
    if (progress == BROKE) return false;
    if (progress == STUCK) {
      say("threads of a block wait for others that never come: some have left, or stand at another barrier");
      return false;
    }
  }
  if (!shared.rest_is_poison()) {
    say("wrote past the end of its shared memory");
    return false;
  }
  return true;
}

void on_bad_access(int, siginfo_t* info, void*) {
  say("touches memory outside its tensors and shared memory, or more stack than a thread has, at %p", info->si_addr);
  siglongjmp(scheduler, FAILED);
}

// Answers a bad access with a failed launch for as long as it lives.
class BadAccessGuard {
 public:
  BadAccessGuard() {
    static unsigned char* const memory = guarded(SIGNAL_STACK_BYTES);  // a thread's own may be what has run out
    stack_t stack = {};
    stack.ss_sp = memory;
    stack.ss_size = SIGNAL_STACK_BYTES;
    sigaltstack(&stack, &stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~BadAccessGuard() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  stack_t stack_;
  struct sigaction segv_, bus_;
};

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  siglongjmp(scheduler, FAILED);
}

unsigned lane() { return (current - block->threads.data()) % warpSize; }

void block_barrier(Site site) {
  Site& others = block->barrier_site;
  if (block->at_barrier > 0 && (others.line != site.line || std::strcmp(others.file, site.file) != 0)) {
    fail("threads of one block stand at different barriers: %s:%d and %s:%d", others.file, others.line, site.file,
         site.line);
  }
  others = site;
  const uint64_t target = block->barriers + 1;
  ++block->at_barrier;
  release_barrier_if_full();
  wait_until(block->barriers, target);  // also where all are here: not the last to come is to go on first
}

const unsigned char* exchange(const char* kind, unsigned mask, const void* mine, size_t size) {
  const size_t thread = current - block->threads.data();
  Warp& warp = block->warps[thread / warpSize];
  if (block->threads.size() % warpSize != 0) {
    fail("%s in a block of %zu threads, no multiple of 32", kind, block->threads.size());
  }
  if (mask != ~0u) fail("%s with mask %#x: the emulator knows whole warps only", kind, mask);
  if (warp.arrived != 0 && (std::strcmp(warp.kind, kind) != 0 || warp.size != size)) {
    fail("lanes of one warp diverge: one is at %s, others at %s", kind, warp.kind);
  }
  warp.kind = kind;
  warp.size = size;
  unsigned char* lanes = warp.lanes[current->collectives & 1];
  if (size > 0) std::memcpy(lanes + lane() * LANE_BYTES, mine, size);
  warp.arrived |= 1u << lane();
  if (warp.arrived == ~0u) {
    warp.arrived = 0;
    ++warp.completed;
  }
  if (warp.completed < ++current->collectives) wait_until(warp.completed, current->collectives);
  return lanes;
}

void* static_shared(size_t size, int line) {
  if (shared.static_line != 0 && (shared.static_line != line || shared.static_bytes != size)) {
    fail("shared memory is declared in lines %d and %d, but must be once in a kernel", shared.static_line, line);
  }
  if (size > SHARED_BYTES_UNASKED) {
    fail("%zu bytes of static shared memory, at most %zu can be had", size, SHARED_BYTES_UNASKED);
  }
  const size_t most = shared.dynamic_allowed == 0 ? SHARED_BYTES_UNASKED : SHARED_BYTES;
  if (size + shared.dynamic_bytes > most) {
    fail("%zu bytes of static and %zu of dynamic shared memory, together at most %zu can be had", size,
         shared.dynamic_bytes, most);
  }
  shared.static_bytes = size;
  shared.static_line = line;
  return shared.memory;
}

void* dynamic_shared() { return shared.dynamic(); }

void check_shared(const char* what, const void* from, size_t bytes) {
  if (!shared.contains(from, bytes)) fail("%s of %zu bytes at %p, outside the block's shared memory", what, bytes, from);
}

void copy_async(void* to, const void* global, size_t bytes, size_t zeros) {
  check_shared("cp.async", to, bytes + zeros);
  std::memset(to, POISON, bytes + zeros);  // it may arrive at any time from now on
  current->uncommitted.push_back({to, global, bytes, zeros});
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

cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes > SHARED_BYTES) return cudaErrorInvalidValue;
  shared_allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*),
                   void* captured) {
  const auto asked = shared_allowed.find(kernel);
  shared.dynamic_allowed = asked == shared_allowed.end() ? 0 : asked->second;
  shared.dynamic_bytes = shared_bytes;
  message[0] = 0;
  if (shared_bytes > (shared.dynamic_allowed == 0 ? SHARED_BYTES_UNASKED : shared.dynamic_allowed)) {
    say("%zu bytes of dynamic shared memory were not asked for with cudaFuncSetAttribute", shared_bytes);
  }
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  const bool grid_fits = blocks > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  const bool block_fits = size.x <= 1024 && size.y <= 1024 && size.z <= 64;
  const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
  if (!grid_fits || !block_fits || threads == 0 || threads > 1024) say("the grid or the block has no such size");
  if (message[0] != 0) return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = size;
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

// What the compiler calls (-fsanitize=alignment,bounds) where a GPU would fault, or would touch another variable.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const SourceLocation* at, const void* pointer) {
  sparsecod::emulator::fail("%s:%u: misaligned access at %p", at->file, at->line, pointer);
}
void __ubsan_handle_out_of_bounds(const SourceLocation* at, size_t index) {
  sparsecod::emulator::fail("%s:%u: index %zd is outside the array", at->file, at->line, static_cast<ssize_t>(index));
}

// In which order threads and blocks take turns: 0 forward, 1 reverse, more: shuffled by this seed.
void sparsecod_emulator_set_order(unsigned order) {
  using namespace sparsecod::emulator;
  sparsecod::emulator::order = order > 1 ? SHUFFLED : static_cast<Order>(order);
  random_order.seed(order);
}

// Why the last launch failed; empty if it did not.
const char* sparsecod_emulator_message() { return sparsecod::emulator::message; }
}
