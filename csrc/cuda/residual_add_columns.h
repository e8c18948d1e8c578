// Power sums of columns: added up over blocks, and for rows that do not fit into registers a kernel of their own.

#pragma once

#include "../common/columns.h"
#include "launch.h"
#include "residual_add_rows.h"

namespace sparsecod::cuda {
namespace {

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

}  // namespace
}  // namespace sparsecod::cuda
