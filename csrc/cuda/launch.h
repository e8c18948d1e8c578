// How kernels are launched and where their shared memory lies: on a GPU, and in the emulator of tests/cuda_emulator/.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/host_device.h"

#if defined(SPARSECOD_EMULATOR)

// `kernel` is a function pointer; the value is a cudaError_t.
#define SPARSECOD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                              \
  ::sparsecod::emulator::launch(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(block), shared_bytes, [&] { \
    static_cast<void>(stream);                                                                                      \
    (*kernel)(__VA_ARGS__);                                                                                         \
  })
// One per kernel: `name` is a reference to a Type that the threads of a block share. It starts as garbage.
#define SPARSECOD_SHARED(Type, name) \
  Type& name = *static_cast<Type*>(::sparsecod::emulator::static_shared(sizeof(Type), __LINE__))
// One per kernel: `name` points to the bytes asked for at the launch, aligned to 1024.
#define SPARSECOD_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::sparsecod::emulator::dynamic_shared())

#else

#define SPARSECOD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((*kernel)<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__), cudaGetLastError())
#define SPARSECOD_SHARED(Type, name) __shared__ Type name
#define SPARSECOD_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

#endif

#define SPARSECOD_RETURN_IF_ERROR(expression)             \
  do {                                                    \
    if (const cudaError_t error = (expression); error != cudaSuccess) return error; \
  } while (false)

namespace sparsecod::cuda {

constexpr int WARP = 32;
constexpr unsigned WHOLE_WARP = 0xffffffffu;

// Blocks that fill the current device, for kernels whose blocks loop over the work.
template <typename Kernel>
cudaError_t resident_blocks(Kernel* kernel, int threads, size_t shared_bytes, int64_t& blocks) {
  int device, multiprocessors, each;
  SPARSECOD_RETURN_IF_ERROR(cudaGetDevice(&device));
  SPARSECOD_RETURN_IF_ERROR(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  SPARSECOD_RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes));
  if (each < 1) return cudaErrorInvalidConfiguration;
  blocks = static_cast<int64_t>(multiprocessors) * each;
  return cudaSuccess;
}

}  // namespace sparsecod::cuda
