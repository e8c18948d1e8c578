// The second kernel of a residual add: from what the first left of each row to moments, in float64. The rows that
// float32 does not suffice for it measures anew.

#pragma once

#include "../common/moments.h"
#include "reduce.h"
#include "residual_add_rows.h"

namespace sparsecod::cuda {
namespace {

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

}  // namespace
}  // namespace sparsecod::cuda
