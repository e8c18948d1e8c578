// y = branch + bias + residual and the moments of all three, in one pass over memory.
//
// A group of threads (a warp for narrow rows, a block for wide ones) holds a row in registers: it adds and sums, then
// takes powers of the distances to the mean. What it leaves of a row are ten floats. A second, small kernel turns them
// into moments in float64, which would crowd the registers of the first, and sees to the rows that float32 does not
// suffice for.

#include "residual_add_moments.h"

#include "../common/columns.h"
#include "../common/moments.h"
#include "element.h"
#include "group.h"

namespace sparsecod::cuda {
namespace {

template <typename T>
struct Rows {
  const T* branch;
  const T* residual;
  const T* bias;  // null for none
  T* output;
  int64_t count, width;
};

// One thread's part of a row, in registers; PACKS of 16 bytes of either operand.
template <typename T, int PACKS>
struct RowInRegisters {
  static constexpr int COLUMNS = PACKS * Pack<T>::COUNT;
  Pack<T> branch[PACKS], residual[PACKS];
  const Rows<T>& rows;
  const int64_t at;
  const int first, stride, packs;

  __device__ __forceinline__ RowInRegisters(const Rows<T>& rows, int64_t row, int rank, int size)
      : rows(rows), at(row * rows.width), first(rank), stride(size), packs(rows.width / Pack<T>::COUNT) {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      if (first + i * stride >= packs) continue;
      branch[i] = Pack<T>::load(rows.branch + at + column(i));
      residual[i] = Pack<T>::load(rows.residual + at + column(i));
    }
  }

  __device__ __forceinline__ int column(int pack) const { return (first + pack * stride) * Pack<T>::COUNT; }

  // Calls visit(index, branch, residual, output) for each column of this thread, and writes the output if asked to.
  template <bool WRITE, typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      if (first + i * stride >= packs) continue;
      Pack<T> output, bias;
      if (rows.bias != nullptr) bias = Pack<T>::load(rows.bias + column(i));
#pragma unroll
      for (int j = 0; j < Pack<T>::COUNT; ++j) {
        float f = to_real(branch[i].elements[j]);
        if (rows.bias != nullptr) f += to_real(bias.elements[j]);
        const float h = to_real(residual[i].elements[j]), y = f + h;
        visit(i * Pack<T>::COUNT + j, f, h, y);
        if constexpr (WRITE) output.elements[j] = from_real<T>(y);
      }
      if constexpr (WRITE) output.store(rows.output + at + column(i));
    }
  }
};

// One thread's part of a row of any width and alignment: read anew for each sweep.
template <typename T>
struct RowInMemory {
  static constexpr int COLUMNS = 0;
  const Rows<T>& rows;
  const int64_t at;
  const int first, stride;

  __device__ __forceinline__ RowInMemory(const Rows<T>& rows, int64_t row, int rank, int size)
      : rows(rows), at(row * rows.width), first(rank), stride(size) {}

  template <bool WRITE, typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (int64_t column = first; column < rows.width; column += stride) {
      float f = to_real(rows.branch[at + column]);
      if (rows.bias != nullptr) f += to_real(rows.bias[column]);
      const float h = to_real(rows.residual[at + column]), y = f + h;
      visit(0, f, h, y);
      if constexpr (WRITE) rows.output[at + column] = from_real<T>(y);
    }
  }
};

// What is left of a row: RowPowers in float32.
struct alignas(16) RowRecord {
  float mean[NUM_OPERANDS], second[NUM_OPERANDS], fourth[NUM_OPERANDS], product;
};

// What the first kernel leaves for the second.
struct Records {
  RowRecord* rows;
  float* largest;    // [blocks, NUM_OPERANDS]
  unsigned* ticket;  // 0
};

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

constexpr int RECORD_THREADS = 128, RECORD_WARPS = RECORD_THREADS / WARP;
constexpr int64_t MAX_RECORD_BLOCKS = 128;

struct SharedTotals {
  double totals[RECORD_WARPS][NUM_MOMENTS];
  bool is_last;
};

// Adds to `totals` a row that float32 does not suffice for. By one warp.
template <typename T>
__device__ __forceinline__ void add_row_checked(double* totals, const Rows<T>& rows, int64_t index,
                                                double inverse_width) {
  const int lane = threadIdx.x % WARP;
  const RowInMemory<T> row(rows, index, lane, WARP);
  CheckedRowSums sums;
  row.template for_each<false>([&](int, float f, float h, float y) { sums.add(f, h, y); });
  double mean[NUM_OPERANDS];
#pragma unroll
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    sums.sum[i] = warp_sum(sums.sum[i]);
    sums.nonfinite[i] = warp_sum(sums.nonfinite[i]);
    sums.highest[i] = warp_max(sums.highest[i]);
    sums.lowest[i] = -warp_max(-sums.lowest[i]);
    mean[i] = sums.mean(i, inverse_width);
  }
  RowPowers<double> powers(mean);
  row.template for_each<false>([&](int, float f, float h, float y) { powers.add(f, h, y); });
#pragma unroll
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    powers.second[i] = warp_sum(powers.second[i]);
    powers.fourth[i] = warp_sum(powers.fourth[i]);
  }
  powers.product = warp_sum(powers.product);
  if (lane == 0) {
    add_row(totals, powers, inverse_width);
    add_checked(totals, sums);
  }
  __syncwarp();
}

// Adds one row for each lane to `totals`, if the lane has one.
template <typename T>
__device__ __forceinline__ void add_rows(double* totals, const Rows<T>& rows, const RowRecord* records, int64_t row,
                                         double inverse_width) {
  const int lane = threadIdx.x % WARP;
  const bool present = row < rows.count;
  const RowRecord record = present ? records[row] : RowRecord{};
  const double mean[NUM_OPERANDS] = {record.mean[0], record.mean[1], record.mean[2]};
  RowPowers<double> powers(mean);
#pragma unroll
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    powers.second[i] = record.second[i];
    powers.fourth[i] = record.fourth[i];
  }
  const bool suffices = present && float32_suffices(powers, inverse_width);
#pragma unroll
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    OperandSums sums = {0, 0, 0, 0};
    if (suffices) sums = operand_sums(powers.mean[i], powers.second[i], powers.fourth[i], inverse_width);
    sums = {warp_sum(sums.variance), warp_sum(sums.squared_mean), warp_sum(sums.fourth_moment),
            warp_sum(sums.kurtosis)};
    if (lane == 0) {
      double* operand = totals + i * MOMENTS_PER_OPERAND;
      operand[BRANCH_VARIANCE] += sums.variance;
      operand[BRANCH_SQUARED_MEAN] += sums.squared_mean;
      operand[BRANCH_FOURTH_MOMENT] += sums.fourth_moment;
      operand[BRANCH_KURTOSIS] += sums.kurtosis;
    }
  }
  const double covariance = warp_sum(suffices ? record.product * inverse_width : 0.0);
  const int added = __popc(__ballot_sync(WHOLE_WARP, suffices));
  if (lane == 0) {
    totals[COVARIANCE] += covariance;
    totals[TOKENS] += added;
  }
  __syncwarp();
  for (unsigned rest = __ballot_sync(WHOLE_WARP, present && !suffices); rest != 0; rest &= rest - 1) {
    add_row_checked(totals, rows, row - lane + __ffs(rest) - 1, inverse_width);
  }
}

// Adds the moments of all rows to `moments`. `largest_blocks` blocks have left their largest magnitudes. The last block
// to end adds up what all found, in the order of blocks.
template <typename T>
__global__ void __launch_bounds__(RECORD_THREADS)
    add_records(const Rows<T> rows, const Records records, int64_t largest_blocks, double* partials,
                double* moments) {
  SPARSECOD_SHARED(SharedTotals, shared);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  double* totals = shared.totals[warp];
  if (lane < NUM_MOMENTS) totals[lane] = 0;
  __syncwarp();
  const double inverse_width = 1.0 / rows.width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * RECORD_THREADS;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * RECORD_THREADS + warp * WARP; first < rows.count;
       first += stride) {
    add_rows(totals, rows, records.rows, first + lane, inverse_width);
  }
  __syncthreads();
  if (threadIdx.x < NUM_MOMENTS) {
    const int m = threadIdx.x;
    double total = 0;
    for (int i = 0; i < RECORD_WARPS; ++i) {
      const double part = shared.totals[i][m];
      total = is_max(m) ? larger(part, total) : total + part;
    }
    partials[static_cast<int64_t>(blockIdx.x) * NUM_MOMENTS + m] = total;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.is_last = atomicAdd(records.ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  for (int m = warp; m < NUM_MOMENTS; m += RECORD_WARPS) {
    double total = 0;
    for (int block = lane; block < gridDim.x; block += WARP) {
      const double part = __ldcg(partials + static_cast<int64_t>(block) * NUM_MOMENTS + m);
      total = is_max(m) ? larger(part, total) : total + part;
    }
    if (is_max(m)) {
      for (int64_t block = lane; block < largest_blocks; block += WARP) {
        total = larger<double>(records.largest[block * NUM_OPERANDS + m / MOMENTS_PER_OPERAND], total);
      }
    }
    total = is_max(m) ? warp_max(total) : warp_sum(total);
    if (lane == 0) moments[m] = is_max(m) ? larger(total, moments[m]) : moments[m] + total;
  }
}

constexpr int COLUMN_ROWS = 8;  // of threads in a block of WARP x COLUMN_ROWS, each row for other rows of the tensor

struct ColumnParts {
  double parts[COLUMN_ROWS][NUM_POWERS][WARP];

  // Adds up the parts of the block's columns; the result is valid in the first row of threads.
  __device__ __forceinline__ void sum(double (&powers)[NUM_POWERS]) {
#pragma unroll
    for (int power = 0; power < NUM_POWERS; ++power) parts[threadIdx.y][power][threadIdx.x] = powers[power];
    __syncthreads();
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int power = 0; power < NUM_POWERS; ++power) {
      for (int i = 1; i < COLUMN_ROWS; ++i) powers[power] += parts[i][power][threadIdx.x];
    }
  }
};

// The power sums of columns for rows that do not fit into registers. Block y takes every gridDim.y-th row.
template <typename T>
__global__ void __launch_bounds__(WARP * COLUMN_ROWS)
    column_power_sums(const Rows<T> rows, const double* columns, float* column_partials) {
  SPARSECOD_SHARED(ColumnParts, shared);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x;
  double powers[NUM_POWERS] = {0, 0, 0, 0};
  if (column < rows.width) {
    const float shift = static_cast<float>(columns[SHIFT * rows.width + column]);
    const float bias = rows.bias != nullptr ? to_real(rows.bias[column]) : 0;
    const int64_t stride = static_cast<int64_t>(gridDim.y) * COLUMN_ROWS;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * COLUMN_ROWS + threadIdx.y; row < rows.count; row += stride) {
      const int64_t at = row * rows.width + column;
      const float f = rows.bias != nullptr ? to_real(rows.branch[at]) + bias : to_real(rows.branch[at]);
      add_powers(powers, static_cast<double>(f + to_real(rows.residual[at]) - shift));
    }
  }
  shared.sum(powers);
  if (threadIdx.y > 0 || column >= rows.width) return;
#pragma unroll
  for (int power = 0; power < NUM_POWERS; ++power) {
    column_partials[(static_cast<int64_t>(blockIdx.y) * NUM_POWERS + power) * rows.width + column] = powers[power];
  }
}

// columns[1 + power] += the sum of `parts` partials.
__global__ void __launch_bounds__(WARP * COLUMN_ROWS)
    add_column_partials(double* columns, const float* column_partials, int64_t parts, int64_t width) {
  SPARSECOD_SHARED(ColumnParts, shared);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x;
  double powers[NUM_POWERS] = {0, 0, 0, 0};
  if (column < width) {
    for (int64_t part = threadIdx.y; part < parts; part += COLUMN_ROWS) {
#pragma unroll
      for (int power = 0; power < NUM_POWERS; ++power) {
        powers[power] += column_partials[(part * NUM_POWERS + power) * width + column];
      }
    }
  }
  shared.sum(powers);
  if (threadIdx.y > 0 || column >= width) return;
#pragma unroll
  for (int power = 0; power < NUM_POWERS; ++power) columns[(FIRST + power) * width + column] += powers[power];
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

  Plan(const Rows<T>& rows, bool with_columns) {
    const int64_t packs = rows.width / Pack<T>::COUNT;
    const int packs_each = with_columns ? COLUMN_PACKS : BLOCK_PACKS;
    if (!in_packs<T>(rows.width, rows.branch, rows.residual, rows.bias, rows.output) ||
        packs > BlockGroup::MAX_THREADS * packs_each) {
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
    const int64_t needed = (rows.count + RECORD_THREADS - 1) / RECORD_THREADS;
    record_blocks = needed < MAX_RECORD_BLOCKS ? needed : MAX_RECORD_BLOCKS;
  }

  cudaError_t size_grid(int64_t rows, bool with_columns) {
    SPARSECOD_RETURN_IF_ERROR(resident_blocks(kernel, threads, 0, blocks));
    const int64_t needed = (rows + groups - 1) / groups;
    blocks = needed < blocks ? needed : blocks;
    if (with_columns) column_parts = !columns_apart ? blocks : rows < COLUMN_BLOCKS * COLUMN_ROWS ? 1 : COLUMN_BLOCKS;
    return cudaSuccess;
  }

  int64_t scratch_bytes(const Rows<T>& rows) const {
    return rows.count * sizeof(RowRecord) + record_blocks * NUM_MOMENTS * sizeof(double) +
           blocks * NUM_OPERANDS * sizeof(float) + column_parts * NUM_POWERS * rows.width * sizeof(float) +
           sizeof(unsigned);
  }

 private:
  static int threads_for(int64_t packs, int packs_each) {
    return static_cast<int>((packs + packs_each * WARP - 1) / (packs_each * WARP)) * WARP;
  }
};

template <typename T>
cudaError_t launch(const Rows<T>& rows, double* moments, double* columns, void* scratch, cudaStream_t stream) {
  Plan<T> plan(rows, columns != nullptr);
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
    for (uintptr_t offset = 0; offset <= 1; ++offset) {
      const T* pointer = reinterpret_cast<const T*>(offset);
      const Rows<T> unknown = {pointer, pointer, nullptr, nullptr, rows, width};
      Plan<T> plan(unknown, with_columns);
      SPARSECOD_RETURN_IF_ERROR(plan.size_grid(rows, with_columns));
      const int64_t needed = plan.scratch_bytes(unknown);
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
