// Power sums of the columns of y = branch + bias + residual, for the few steps that ask for them: a pass of its own.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "../common/columns.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

// Each task takes some columns of all rows, so that sums do not depend on the thread count.
constexpr int64_t COLUMNS_PER_TASK = 64;

template <typename T>
void add_columns(const T* branch, const T* residual, const T* bias, double* columns, int64_t rows, int64_t width,
                 int64_t begin, int64_t end) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  double shifts[COLUMNS_PER_TASK], sums[COLUMNS_PER_TASK][NUM_POWERS] = {};
  for (int64_t j = begin; j < end; ++j) shifts[j - begin] = static_cast<Real>(columns[SHIFT * width + j]);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = begin; j < end; ++j) {
      Real f = static_cast<Real>(branch[row * width + j]);
      if (bias != nullptr) f += static_cast<Real>(bias[j]);
      add_powers(sums[j - begin], f + static_cast<Real>(residual[row * width + j]) - shifts[j - begin]);
    }
  }
  for (int64_t j = begin; j < end; ++j) {
    for (int power = 0; power < NUM_POWERS; ++power) columns[(FIRST + power) * width + j] += sums[j - begin][power];
  }
}

}  // namespace

void add_column_powers(const at::Tensor& branch, const at::Tensor& residual, const std::optional<at::Tensor>& bias,
                       const at::Tensor& columns) {
  const at::Tensor branch_rows = branch.contiguous(), residual_rows = residual.contiguous();
  const at::Tensor bias_row = bias ? bias->contiguous() : at::Tensor();
  const int64_t width = branch.size(-1), rows = branch.numel() / width;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, branch.scalar_type(), "add_column_powers", [&] {
    const scalar_t* bias_data = bias ? bias_row.const_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, at::divup(width, COLUMNS_PER_TASK), 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        add_columns(branch_rows.const_data_ptr<scalar_t>(), residual_rows.const_data_ptr<scalar_t>(), bias_data,
                    columns.mutable_data_ptr<double>(), rows, width, task * COLUMNS_PER_TASK,
                    std::min((task + 1) * COLUMNS_PER_TASK, width));
      }
    });
  });
}

}  // namespace sparsecod::cpu
