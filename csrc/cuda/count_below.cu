// Elements below thresholds, in all tensors of a list. What the tensors are comes with the kernel's parameters, so that
// nothing is copied and nobody waits; a block takes one chunk of one tensor.
//
// Magnitudes are compared as integers (thresholds.h), a 32-bit word at a time: with the sign bits of its one or two
// elements set, subtracting the threshold's bits from each clears the sign bit of just those that are below it, and
// never borrows from the neighbour.

#include "count_below.h"

#include "../common/thresholds.h"
#include "element.h"
#include "reduce.h"

namespace sparsecod::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int PACK_BYTES = 16, WORDS_PER_PACK = 4;
constexpr int PACKS_IN_FLIGHT = 4;  // a thread's
constexpr int WORDS_IN_FLIGHT = PACKS_IN_FLIGHT * WORDS_PER_PACK;
constexpr int CHUNK_BYTES = 4 * PACKS_IN_FLIGHT * PACK_BYTES * THREADS;
constexpr uint32_t NOT_A_NUMBER = 0xffffffffu;  // in every format: below no threshold

constexpr size_t PARAMETER_BYTES = 4096;  // of any kernel
constexpr int MAX_PIECES = 152;
constexpr int NUM_DTYPES = 3;

struct Piece {
  const unsigned char* elements;
  int64_t bytes;
  uint32_t first_chunk;  // within the launch
  uint32_t tensor;
};

struct Work {
  Piece pieces[MAX_PIECES];
  uint8_t dtypes[MAX_PIECES];
  uint32_t not_below[NUM_DTYPES][MAX_THRESHOLDS];  // bits of thresholds, in each element of a word
  int32_t num_pieces, num_thresholds;
};
static_assert(sizeof(Work) + sizeof(int64_t*) <= PARAMETER_BYTES);

constexpr int element_bytes(Dtype dtype) { return dtype == Dtype::FLOAT32 ? 4 : 2; }

// Chunks begin where packs do: the first and the last pack of a piece may be incomplete.
__host__ __device__ inline uintptr_t first_pack(const Piece& piece) {
  return reinterpret_cast<uintptr_t>(piece.elements) / PACK_BYTES * PACK_BYTES;
}

// The element of an incomplete pack that this thread counts, in the lower half of a word or as a whole one.
__device__ __forceinline__ uint32_t edge_element(uintptr_t from, uintptr_t to, int index, int bytes) {
  const uintptr_t at = from + index * bytes;
  if (index < 0 || at >= to) return NOT_A_NUMBER;
  if (bytes == 4) return *reinterpret_cast<const uint32_t*>(at);
  return *reinterpret_cast<const uint16_t*>(at) | NOT_A_NUMBER << 16;
}

template <int MAX_COUNTS>
struct Counts {
  int of_warp[WARPS][MAX_COUNTS];
};

template <int MAX_COUNTS>
__global__ void __launch_bounds__(THREADS) count_below(const __grid_constant__ Work work, int64_t* counts) {
  SPARSECOD_SHARED(Counts<MAX_COUNTS>, shared);
  const int thread = threadIdx.x;
  int index = 0;
  for (int beyond = work.num_pieces; beyond - index > 1;) {  // the last piece that begins at this chunk or before
    const int middle = (index + beyond) / 2;
    (work.pieces[middle].first_chunk <= blockIdx.x ? index : beyond) = middle;
  }
  const Piece& piece = work.pieces[index];
  const int dtype = work.dtypes[index], bytes = element_bytes(static_cast<Dtype>(dtype));
  const uint32_t signs = bytes == 4 ? 0x80000000u : 0x80008000u;
  // Where a sign bit of the sixteen words can have gone in their union below.
  const uint32_t used = bytes == 4 ? 0xffff0000u : 0xffffffffu;
  uint32_t not_below[MAX_COUNTS];
  int below[MAX_COUNTS];
#pragma unroll
  for (int i = 0; i < MAX_COUNTS; ++i) {
    not_below[i] = work.not_below[dtype][i];
    below[i] = 0;
  }

  const uintptr_t start = reinterpret_cast<uintptr_t>(piece.elements), end = start + piece.bytes;
  const uintptr_t first_whole = (start + PACK_BYTES - 1) / PACK_BYTES * PACK_BYTES;
  const uintptr_t last_whole = end / PACK_BYTES * PACK_BYTES;  // the end of it
  const uintptr_t chunk = first_pack(piece) + static_cast<uintptr_t>(blockIdx.x - piece.first_chunk) * CHUNK_BYTES;
  const uintptr_t chunk_end = min(chunk + CHUNK_BYTES, last_whole);
  static_assert(WORDS_IN_FLIGHT == 16, "their sign bits fill a word");
  for (uintptr_t at = max(chunk, first_whole) + thread * PACK_BYTES; at - thread * PACK_BYTES < chunk_end;
       at += PACKS_IN_FLIGHT * THREADS * PACK_BYTES) {
    uint32_t words[WORDS_IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < PACKS_IN_FLIGHT; ++i) {
      const uintptr_t from = at + i * THREADS * PACK_BYTES;
      uint4 pack = {NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER};
      if (from < chunk_end) pack = __ldcs(reinterpret_cast<const uint4*>(from));
      const uint32_t of_pack[WORDS_PER_PACK] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
      for (int j = 0; j < WORDS_PER_PACK; ++j) words[i * WORDS_PER_PACK + j] = of_pack[j] | signs;
    }
#pragma unroll
    for (int i = 0; i < MAX_COUNTS; ++i) {
      uint32_t kept = 0;
#pragma unroll
      for (uint32_t word : words) kept = kept >> 1 | ((word - not_below[i]) & signs);
      below[i] += __popc(~kept & used);
    }
  }

  // The first threads take what comes before the first whole pack, others what comes after the last.
  constexpr int MOST = PACK_BYTES / 2;  // more than are in any incomplete pack
  uint32_t edge = NOT_A_NUMBER;
  if (thread < MOST) {
    if (chunk < first_whole) edge = edge_element(start, min(first_whole, end), thread, bytes);
  } else {
    const uintptr_t after = max(last_whole, first_whole);
    if (after < chunk + CHUNK_BYTES && after >= chunk) edge = edge_element(after, end, thread - MOST, bytes);
  }
#pragma unroll
  for (int i = 0; i < MAX_COUNTS; ++i) below[i] += __popc(~((edge | signs) - not_below[i]) & signs);

#pragma unroll
  for (int i = 0; i < MAX_COUNTS; ++i) {
    const int of_warp = warp_sum(below[i]);
    if (thread % WARP == 0) shared.of_warp[thread / WARP][i] = of_warp;
  }
  __syncthreads();
  if (thread < work.num_thresholds) {
    unsigned long long total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += shared.of_warp[warp][thread];
    // Integers: the same sum in any order.
    atomicAdd(reinterpret_cast<unsigned long long*>(counts) + int64_t{piece.tensor} * work.num_thresholds + thread,
              total);
  }
}

cudaError_t launch(const Work& work, unsigned chunks, int64_t* counts, cudaStream_t stream) {
  const auto kernel = work.num_thresholds <= 4 ? &count_below<4> : &count_below<MAX_THRESHOLDS>;
  return SPARSECOD_LAUNCH(kernel, chunks, THREADS, 0, stream, work, counts);
}

}  // namespace
}  // namespace sparsecod::cuda

cudaError_t sparsecod_count_below(const void* const* tensors, const int64_t* sizes,
                                  const sparsecod::cuda::Dtype* dtypes, int64_t num_tensors, const double* thresholds,
                                  int64_t num_thresholds, int64_t* counts, cudaStream_t stream) {
  using namespace sparsecod;
  using namespace sparsecod::cuda;
  Work work = {};
  work.num_thresholds = static_cast<int32_t>(num_thresholds);
  for (int i = 0; i < num_thresholds; ++i) {
    const auto both_halves = [](uint64_t bits) { return static_cast<uint32_t>(bits << 16 | bits); };
    work.not_below[static_cast<int>(Dtype::FLOAT32)][i] =
        static_cast<uint32_t>(bits_not_below(thresholds[i], FLOAT32_FORMAT));
    work.not_below[static_cast<int>(Dtype::BFLOAT16)][i] = both_halves(bits_not_below(thresholds[i], BFLOAT16_FORMAT));
    work.not_below[static_cast<int>(Dtype::FLOAT16)][i] = both_halves(bits_not_below(thresholds[i], FLOAT16_FORMAT));
  }
  constexpr int64_t MAX_CHUNKS = INT32_MAX;  // of a grid
  int64_t chunks = 0;
  for (int64_t tensor = 0; tensor < num_tensors; ++tensor) {
    if (sizes[tensor] == 0) continue;
    Piece piece = {static_cast<const unsigned char*>(tensors[tensor]), sizes[tensor] * element_bytes(dtypes[tensor]),
                   static_cast<uint32_t>(chunks), static_cast<uint32_t>(tensor)};
    const uintptr_t reach = reinterpret_cast<uintptr_t>(piece.elements) + piece.bytes - first_pack(piece);
    const int64_t in_piece = (reach + CHUNK_BYTES - 1) / CHUNK_BYTES;
    if (in_piece > MAX_CHUNKS) return cudaErrorInvalidValue;  // 128 TiB
    if (work.num_pieces == MAX_PIECES || chunks + in_piece > MAX_CHUNKS) {
      SPARSECOD_RETURN_IF_ERROR(launch(work, static_cast<unsigned>(chunks), counts, stream));
      work.num_pieces = 0;
      piece.first_chunk = 0;
      chunks = 0;
    }
    work.pieces[work.num_pieces] = piece;
    work.dtypes[work.num_pieces] = static_cast<uint8_t>(dtypes[tensor]);
    ++work.num_pieces;
    chunks += in_piece;
  }
  return chunks == 0 ? cudaSuccess : launch(work, static_cast<unsigned>(chunks), counts, stream);
}
