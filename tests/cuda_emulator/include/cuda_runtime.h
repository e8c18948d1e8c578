// What the kernels use of the CUDA runtime, on a CPU without it. Found before NVIDIA's header when the emulator is built.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define __constant__ static const

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SPARSECOD_VECTOR_TYPES(type, name, alignment2, alignment4)                                      \
  struct __align__(alignment2) name##2 { type x, y; };                                                  \
  struct __align__(alignment4) name##4 { type x, y, z, w; };                                            \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                      \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SPARSECOD_VECTOR_TYPES(float, float, 8, 16)
SPARSECOD_VECTOR_TYPES(int, int, 8, 16)
SPARSECOD_VECTOR_TYPES(unsigned, uint, 8, 16)
SPARSECOD_VECTOR_TYPES(double, double, 16, 16)
#undef SPARSECOD_VECTOR_TYPES

// The thread that runs: set by the scheduler whenever it lets one go on.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace sparsecod::emulator {

constexpr size_t SHARED_BYTES = 232448;        // a block's most on Hopper
constexpr size_t SHARED_BYTES_UNASKED = 49152;  // and without cudaFuncSetAttribute

// Where in the kernel's source.
struct Site {
  const char* file;
  int line;
};

// Lets the other threads go on until all threads of the block that have not left are here.
void block_barrier(Site site);

// Which of its warp's 32 lanes the running thread is, whatever the shape of the block.
unsigned lane();

// Gives `size` bytes of each of the warp's 32 lanes to all of them: LANE_BYTES apart, until the next call but one.
constexpr size_t LANE_BYTES = 64;
const unsigned char* exchange(const char* kind, unsigned mask, const void* mine, size_t size);

void* static_shared(size_t size, int line);
void* dynamic_shared();

// Fails unless `what` stays within the block's shared memory.
void check_shared(const char* what, const void* from, size_t bytes);

// Copies that arrive when they are waited for, not before.
void copy_async(void* shared, const void* global, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(int groups_still_under_way);

// Stops the launch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

cudaError_t allow_shared(const void* kernel, size_t bytes);

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* captured);

template <typename Body>
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  return launch(kernel, grid, block, shared_bytes, [](void* body) { (*static_cast<Body*>(body))(); }, &body);
}

template <typename T, typename Source>
T exchanged(const char* kind, unsigned mask, T mine, Source source) {
  static_assert(sizeof(T) <= LANE_BYTES && std::is_trivially_copyable_v<T>);
  const unsigned char* lanes = exchange(kind, mask, &mine, sizeof(T));
  T theirs;
  std::memcpy(&theirs, lanes + LANE_BYTES * (source(lane()) % warpSize), sizeof(T));
  return theirs;
}

}  // namespace sparsecod::emulator

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  sparsecod::emulator::block_barrier({file, line});
}
inline void __syncwarp(unsigned mask = ~0u) { sparsecod::emulator::exchange("__syncwarp", mask, nullptr, 0); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = warpSize) {
  return sparsecod::emulator::exchanged("__shfl_sync", mask, x, [=](unsigned lane) {
    return lane / width * width + static_cast<unsigned>(source) % width;
  });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = warpSize) {
  return sparsecod::emulator::exchanged("__shfl_xor_sync", mask, x, [=](unsigned lane) {
    const unsigned other = lane ^ bits;
    return other / width > lane / width ? lane : other;
  });
}

template <typename T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = warpSize) {
  return sparsecod::emulator::exchanged("__shfl_down_sync", mask, x, [=](unsigned lane) {
    return lane % width + delta < static_cast<unsigned>(width) ? lane + delta : lane;
  });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = warpSize) {
  return sparsecod::emulator::exchanged("__shfl_up_sync", mask, x,
                                        [=](unsigned lane) { return lane % width >= delta ? lane - delta : lane; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned char* lanes = sparsecod::emulator::exchange("__ballot_sync", mask, &predicate, sizeof(predicate));
  unsigned ballot = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    int theirs;
    std::memcpy(&theirs, lanes + sparsecod::emulator::LANE_BYTES * lane, sizeof(theirs));
    ballot |= (theirs != 0 ? 1u : 0u) << lane;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

// Threads of one process take turns: an atomic is a plain operation.
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <typename T>
T __ldg(const T* address) { return *address; }
template <typename T>
T __ldcg(const T* address) { return *address; }
template <typename T>
T __ldcs(const T* address) { return *address; }
template <typename T>
void __stcs(T* address, T value) { *address = value; }

template <typename To, typename From>
To sparsecod_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float x) { return sparsecod_bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return sparsecod_bit_cast<float>(x); }
inline int __float_as_int(float x) { return sparsecod_bit_cast<int>(x); }
inline float __int_as_float(int x) { return sparsecod_bit_cast<float>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : static_cast<int>(sparsecod::emulator::SHARED_BYTES);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return sparsecod::emulator::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
