// y = branch + bias + residual and the moments of all three, in one pass over memory.
//
// A group of threads (a warp for narrow rows, a block for wide ones) holds a row in registers: it adds and sums, then
// takes powers of the distances to the mean. What it leaves of a row are ten floats. A second, small kernel turns them
// into moments in float64, which would crowd the registers of the first, and sees to the rows that float32 does not
// suffice for.

#include "residual_add_moments.h"

#include "../common/columns.h"
#include "../common/moments.h"
#include "group.h"
#include "residual_add_columns.h"
#include "residual_add_records.h"
#include "residual_add_rows.h"

namespace sparsecod::cuda {
namespace {

struct Shared {
  float sums[MAX_WARPS * NUM_OPERANDS], powers[MAX_WARPS * (2 * NUM_OPERANDS + 1)];
  float largest[NUM_OPERANDS][MAX_WARPS];
};

// `column_partials` [gridDim.x, NUM_POWERS, width] receive the blocks' power sums of columns, if COLUMNS.
template <typename T, typename Group, typename Row, bool COLUMNS>
__global__ void __launch_bounds__(Group::MAX_THREADS)
    residual_add_moments(const Rows<T> rows, const Records records, const double* columns, float* column_partials) {
  SPARSECOD_SHARED(Shared, shared);
  const int rank = Group::rank(), size = Group::size(), groups = Group::groups();
  const auto column = [&](int index) {
    return (rank + index / Pack<T>::COUNT * size) * Pack<T>::COUNT + index % Pack<T>::COUNT;
  };
  float shift[COLUMNS ? Row::COLUMNS : 1], powers_of[COLUMNS ? Row::COLUMNS : 1][NUM_POWERS];
  if constexpr (COLUMNS) {
#pragma unroll
    for (int i = 0; i < Row::COLUMNS; ++i) {
      shift[i] = column(i) < rows.width ? static_cast<float>(columns[SHIFT * rows.width + column(i)]) : 0;
#pragma unroll
      for (int power = 0; power < NUM_POWERS; ++power) powers_of[i][power] = 0;
    }
  }

  if (blockIdx.x == 0 && threadIdx.x == 0) *records.ticket = 0;
  const float inverse_width = 1.0f / rows.width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * groups;
  float largest[NUM_OPERANDS] = {0, 0, 0};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * groups + Group::index(); row < rows.count; row += stride) {
    const Row elements(rows, row, rank, size);
    RowSums<float> sums(largest);
    elements.template for_each<true>([&](int, float f, float h, float y) { sums.add(f, h, y); });
    Group::sum(sums.sum, shared.sums);
    bool finite = true;
    float mean[NUM_OPERANDS];
#pragma unroll
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      finite = finite && sums.sum[i] - sums.sum[i] == 0;
      mean[i] = sums.sum[i] * inverse_width;
    }
#pragma unroll
    for (int i = 0; i < NUM_OPERANDS; ++i) largest[i] = finite ? sums.largest[i] : largest[i];

    RowPowers<float> powers(mean);
    elements.template for_each<false>([&](int index, float f, float h, float y) {
      powers.add(f, h, y);
      if constexpr (COLUMNS) add_powers(powers_of[index], y - shift[index]);
    });
    float sum[2 * NUM_OPERANDS + 1] = {powers.second[0], powers.second[1], powers.second[2], powers.fourth[0],
                                       powers.fourth[1], powers.fourth[2], powers.product};
    Group::sum_for_first(sum, shared.powers);
    if (rank == 0) {
      records.rows[row] = {{mean[0], mean[1], mean[2]}, {sum[0], sum[1], sum[2]}, {sum[3], sum[4], sum[5]}, sum[6]};
    }
  }

#pragma unroll
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    const float of_warp = warp_max(largest[i]);
    if (threadIdx.x % WARP == 0) shared.largest[i][threadIdx.x / WARP] = of_warp;
  }
  __syncthreads();
  if (threadIdx.x < NUM_OPERANDS) {
    float of_block = 0;
    for (int warp = 0; warp < blockDim.x / WARP; ++warp) of_block = larger(shared.largest[threadIdx.x][warp], of_block);
    records.largest[blockIdx.x * NUM_OPERANDS + threadIdx.x] = of_block;
  }
  if constexpr (COLUMNS) {
#pragma unroll
    for (int i = 0; i < Row::COLUMNS; ++i) {
      if (column(i) >= rows.width) continue;
#pragma unroll
      for (int power = 0; power < NUM_POWERS; ++power) {
        const int64_t at = (static_cast<int64_t>(blockIdx.x) * NUM_POWERS + power) * rows.width + column(i);
        column_partials[at] = powers_of[i][power];
      }
    }
  }
}

// How a launch is laid out.
template <typename T>
struct Plan {
  using Kernel = void (*)(const Rows<T>, const Records, const double*, float*);
  // Packs of a thread. More would spill, or leave too few threads to keep the memory busy.
  static constexpr int WARP_PACKS = 4, BLOCK_PACKS = 16 / Pack<T>::COUNT, COLUMN_PACKS = 8 / Pack<T>::COUNT;
  static constexpr int64_t COLUMN_BLOCKS = 64;  // of rows, where columns need a kernel of their own

  Kernel kernel;
  int threads, groups = 1;
  int64_t blocks = 0, record_blocks, column_parts = 0;
  bool columns_apart = false;

  // `packed`: rows can be taken 16 bytes at a time.
  Plan(int64_t rows, int64_t width, bool packed, bool with_columns) {
    const int64_t packs = width / Pack<T>::COUNT;
    const int packs_each = with_columns ? COLUMN_PACKS : BLOCK_PACKS;
    if (!packed || packs > BlockGroup::MAX_THREADS * packs_each) {
      kernel = &residual_add_moments<T, BlockGroup, RowInMemory<T>, false>;
      threads = 256;
      columns_apart = with_columns;
    } else if (with_columns) {
      kernel = &residual_add_moments<T, BlockGroup, RowInRegisters<T, COLUMN_PACKS>, true>;
      threads = threads_for(packs, packs_each);
    } else if (packs > WARP * WARP_PACKS) {
      kernel = &residual_add_moments<T, BlockGroup, RowInRegisters<T, BLOCK_PACKS>, false>;
      threads = threads_for(packs, packs_each);
    } else {
      kernel = packs > WARP ? &residual_add_moments<T, WarpGroup, RowInRegisters<T, WARP_PACKS>, false>
                            : &residual_add_moments<T, WarpGroup, RowInRegisters<T, 1>, false>;
      threads = WarpGroup::MAX_THREADS;
      groups = threads / WARP;
    }
    const int64_t needed = (rows + RECORD_THREADS - 1) / RECORD_THREADS;
    record_blocks = needed < MAX_RECORD_BLOCKS ? needed : MAX_RECORD_BLOCKS;
  }

  cudaError_t size_grid(int64_t rows, bool with_columns) {
    SPARSECOD_RETURN_IF_ERROR(resident_blocks(kernel, threads, 0, blocks));
    const int64_t needed = (rows + groups - 1) / groups;
    blocks = needed < blocks ? needed : blocks;
    if (with_columns) column_parts = !columns_apart ? blocks : rows < COLUMN_BLOCKS * COLUMN_ROWS ? 1 : COLUMN_BLOCKS;
    return cudaSuccess;
  }

  int64_t scratch_bytes(int64_t rows, int64_t width) const {
    return rows * sizeof(RowRecord) + record_blocks * NUM_MOMENTS * sizeof(double) +
           blocks * NUM_OPERANDS * sizeof(float) + column_parts * NUM_POWERS * width * sizeof(float) +
           sizeof(unsigned);
  }

 private:
  static int threads_for(int64_t packs, int packs_each) {
    return static_cast<int>((packs + packs_each * WARP - 1) / (packs_each * WARP)) * WARP;
  }
};

template <typename T>
cudaError_t launch(const Rows<T>& rows, double* moments, double* columns, void* scratch, cudaStream_t stream) {
  const bool packed = in_packs<T>(rows.width, rows.branch, rows.residual, rows.bias, rows.output);
  Plan<T> plan(rows.count, rows.width, packed, columns != nullptr);
  SPARSECOD_RETURN_IF_ERROR(plan.size_grid(rows.count, columns != nullptr));
  RowRecord* row_records = static_cast<RowRecord*>(scratch);
  double* partials = reinterpret_cast<double*>(row_records + rows.count);
  float* largest = reinterpret_cast<float*>(partials + plan.record_blocks * NUM_MOMENTS);
  float* column_partials = largest + plan.blocks * NUM_OPERANDS;
  unsigned* ticket = reinterpret_cast<unsigned*>(column_partials + plan.column_parts * NUM_POWERS * rows.width);
  const Records records = {row_records, largest, ticket};
  SPARSECOD_RETURN_IF_ERROR(SPARSECOD_LAUNCH(plan.kernel, static_cast<unsigned>(plan.blocks), plan.threads, 0, stream,
                                             rows, records, columns, column_partials));
  SPARSECOD_RETURN_IF_ERROR(SPARSECOD_LAUNCH(&add_records<T>, static_cast<unsigned>(plan.record_blocks),
                                             RECORD_THREADS, 0, stream, rows, records, plan.blocks, partials, moments));
  if (columns == nullptr) return cudaSuccess;
  const unsigned column_blocks = static_cast<unsigned>((rows.width + WARP - 1) / WARP);
  const dim3 block(WARP, COLUMN_ROWS);
  if (plan.columns_apart) {
    SPARSECOD_RETURN_IF_ERROR(SPARSECOD_LAUNCH(&column_power_sums<T>,
                                               dim3(column_blocks, static_cast<unsigned>(plan.column_parts)), block, 0,
                                               stream, rows, columns, column_partials));
  }
  return SPARSECOD_LAUNCH(&add_column_partials, column_blocks, block, 0, stream, columns, column_partials,
                          plan.column_parts, rows.width);
}

}  // namespace
}  // namespace sparsecod::cuda

cudaError_t sparsecod_residual_add_moments_scratch(sparsecod::cuda::Dtype dtype, int64_t rows, int64_t width,
                                                   bool with_columns, int64_t* bytes) {
  using namespace sparsecod::cuda;
  return SPARSECOD_DISPATCH_DTYPE(dtype, T, [&] {
    *bytes = 0;
    // Whether operands are aligned is not known yet: room for either kernel.
    for (int aligned = 0; aligned <= 1; ++aligned) {
      Plan<T> plan(rows, width, aligned && width % Pack<T>::COUNT == 0, with_columns);
      SPARSECOD_RETURN_IF_ERROR(plan.size_grid(rows, with_columns));
      const int64_t needed = plan.scratch_bytes(rows, width);
      *bytes = needed > *bytes ? needed : *bytes;
    }
    return cudaSuccess;
  });
}

cudaError_t sparsecod_residual_add_moments(const void* branch, const void* residual, const void* bias, void* output,
                                           double* moments, double* columns, void* scratch, sparsecod::cuda::Dtype dtype,
                                           int64_t rows, int64_t width, cudaStream_t stream) {
  using namespace sparsecod::cuda;
  return SPARSECOD_DISPATCH_DTYPE(dtype, T, [&] {
    const Rows<T> all = {static_cast<const T*>(branch), static_cast<const T*>(residual), static_cast<const T*>(bias),
                         static_cast<T*>(output), rows, width};
    return launch(all, moments, columns, scratch, stream);
  });
}
