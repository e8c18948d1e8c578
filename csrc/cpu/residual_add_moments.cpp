// y = branch + bias + residual and, while a row is in cache, the moments of all three.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <vector>

#include "instruction_set.h"
#include "lanes.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

// Rows are cut into blocks by their shape alone and the blocks added in order: results do not depend on the thread
// count.
constexpr int64_t ELEMENTS_PER_BLOCK = 8192;
constexpr int64_t MAX_BLOCKS = 512;
constexpr int64_t BLOCKS_PER_THREAD = 2;  // fewer are not worth waking a thread
// How many numbers a lane adds up in float32 before the sum goes to float64. Until then, what is small against an
// outlier is lost.
constexpr int64_t PACKS_PER_RUN = 32;

template <typename T>
struct Rows {
  const T* branch;
  const T* residual;
  const T* bias;  // null for none
  T* output;
  int64_t width;

  SPARSECOD_INLINE Rows from(int64_t row) const {
    return {branch + row * width, residual + row * width, bias, output + row * width, width};
  }
};

// Compiled for elements of type T, taken N at a time; columns left over at a row's end are taken one by one.
template <typename T, int N, bool HAS_BIAS>
struct Kernel {
  enum Output { KEPT, WRITTEN };

  // Largest magnitude of each operand over any number of rows.
  template <int M>
  struct LargestOf {
    LargestMagnitude<T, M, !HAS_BIAS> branch;
    LargestMagnitude<T, M, true> residual;
    LargestMagnitude<T, M, false> output;
  };

  // In lanes, and among left-over columns.
  struct Largest {
    LargestOf<N> lanes;
    LargestOf<1> rest;

    SPARSECOD_INLINE LargestOf<N>& of(std::integral_constant<int, N>) { return lanes; }
    SPARSECOD_INLINE LargestOf<1>& of(std::integral_constant<int, 1>) { return rest; }
  };

  // First sweep. The output's sum is that of both others.
  template <int M>
  struct Sums {
    using Block = Columns<T, M>;
    Lanes<float, M> branch{}, residual{};
    LargestOf<M> largest;

    SPARSECOD_INLINE void add(const Block& branches, const Block& residuals, const Block& outputs) {
      for (int i = 0; i < Block::PACKS; ++i) {
        branch += branches.packs[i];
        residual += residuals.packs[i];
      }
      largest.branch.add(branches);
      largest.residual.add(residuals);
      largest.output.add(outputs);
    }
  };

  // Second sweep. The output's distance from its mean is the sum of both others', unless they cancel (see `cancels`).
  template <int M>
  struct Powers {
    using Block = Columns<T, M>;
    RowPowers<Lanes<float, M>> run;

    SPARSECOD_INLINE void add(const Block& branches, const Block& residuals, const Block&) {
      for (int i = 0; i < Block::PACKS; ++i) {
        const Lanes<float, M> branch = branches.packs[i] - run.mean[BRANCH];
        const Lanes<float, M> residual = residuals.packs[i] - run.mean[RESIDUAL];
        run.add_distances(branch, residual, branch + residual);
      }
    }
  };

  // Either sweep in double.
  template <typename RowSums>
  struct Checked {
    using Block = Columns<T, 1>;
    RowSums& sums;

    SPARSECOD_INLINE void add(const Block& branches, const Block& residuals, const Block& outputs) {
      sums.add(branches.packs[0], residuals.packs[0], outputs.packs[0]);
    }
  };

  // Feeds columns [begin, end) of a row to sums.add(), M at a time, and returns the first column that is left over.
  template <int M, Output OUTPUT, typename Into>
  static SPARSECOD_INLINE int64_t add_columns(Into& sums, const Rows<T>& row, int64_t begin, int64_t end) {
    using Block = Columns<T, M>;
    const T *branch_at = row.branch + begin, *residual_at = row.residual + begin;
    const T* bias_at = HAS_BIAS ? row.bias + begin : nullptr;
    T* output_at = row.output + begin;
    const int64_t blocks = (end - begin) / Block::COUNT;
    for (int64_t i = 0; i < blocks; ++i) {  // pointers that advance keep the compiler from spilling the column
      Block branch, residual, output;
      branch.load(branch_at);
      residual.load(residual_at);
      if constexpr (HAS_BIAS) {
        Block bias;
        bias.load(bias_at);
        for (int pack = 0; pack < Block::PACKS; ++pack) branch.packs[pack] += bias.packs[pack];
        bias_at += Block::COUNT;
      }
      for (int pack = 0; pack < Block::PACKS; ++pack) output.packs[pack] = branch.packs[pack] + residual.packs[pack];
      sums.add(branch, residual, output);
      if constexpr (OUTPUT == WRITTEN) {
        output.store(output_at);
      } else if constexpr (M > 1) {  // the row below: the second sweep reads from cache and leaves the memory idle
        __builtin_prefetch(branch_at + row.width);
        __builtin_prefetch(residual_at + row.width);
        __builtin_prefetch(output_at + row.width, 1);
      }
      branch_at += Block::COUNT;
      residual_at += Block::COUNT;
      output_at += Block::COUNT;
    }
    return begin + blocks * Block::COUNT;
  }

  template <int M>
  static SPARSECOD_INLINE int64_t add_sums(double (&sum)[NUM_OPERANDS], Largest& largest, const Rows<T>& row,
                                           int64_t column) {
    LargestOf<M>& so_far = largest.of(std::integral_constant<int, M>());
    WideSum<M> branch, residual;
    while (column + Columns<T, M>::COUNT <= row.width) {
      Sums<M> run;
      run.largest = so_far;
      column = add_columns<M, WRITTEN>(run, row, column, std::min(column + PACKS_PER_RUN * M, row.width));
      branch.add(run.branch);
      residual.add(run.residual);
      so_far = run.largest;
    }
    sum[BRANCH] += branch.total();
    sum[RESIDUAL] += residual.total();
    return column;
  }

  template <int M>
  static SPARSECOD_INLINE int64_t add_powers(RowPowers<double>& powers, const Rows<T>& row, int64_t column) {
    float mean[NUM_OPERANDS];
    for (int i = 0; i < NUM_OPERANDS; ++i) mean[i] = static_cast<float>(powers.mean[i]);
    WideSum<M> second[NUM_OPERANDS], fourth[NUM_OPERANDS], product;
    while (column + Columns<T, M>::COUNT <= row.width) {
      Powers<M> part{RowPowers<Lanes<float, M>>(mean)};
      column = add_columns<M, KEPT>(part, row, column, std::min(column + PACKS_PER_RUN * M, row.width));
      for (int i = 0; i < NUM_OPERANDS; ++i) {
        second[i].add(part.run.second[i]);
        fourth[i].add(part.run.fourth[i]);
      }
      product.add(part.run.product);
    }
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      powers.second[i] += second[i].total();
      powers.fourth[i] += fourth[i].total();
    }
    powers.product += product.total();
    return column;
  }

  static SPARSECOD_INLINE RowPowers<double> sweep(Largest& largest, const Rows<T>& row, double inverse_width) {
    double sum[NUM_OPERANDS]{}, mean[NUM_OPERANDS];
    int64_t rest = add_sums<N>(sum, largest, row, 0);
    if (rest < row.width) add_sums<1>(sum, largest, row, rest);
    sum[OUTPUT] = sum[BRANCH] + sum[RESIDUAL];
    for (int i = 0; i < NUM_OPERANDS; ++i) mean[i] = sum[i] * inverse_width;
    RowPowers<double> powers(mean);
    rest = add_powers<N>(powers, row, 0);
    if (rest < row.width) add_powers<1>(powers, row, rest);
    return powers;
  }

  // Whether branch and residual are so opposed that the rounding of their distances, relative 2^-24, weighs more than
  // MAX_GROWTH times as much in the output's. Its powers are then taken from the output itself.
  static SPARSECOD_INLINE bool cancels(const RowPowers<double>& powers) {
    constexpr double MAX_GROWTH = 2;
    const auto opposed = [](double growth, double branch, double residual, double output) {
      return growth * output < branch + residual;
    };
    return opposed(MAX_GROWTH * MAX_GROWTH, powers.second[BRANCH], powers.second[RESIDUAL], powers.second[OUTPUT]) ||
           opposed(MAX_GROWTH * MAX_GROWTH * MAX_GROWTH * MAX_GROWTH, powers.fourth[BRANCH], powers.fourth[RESIDUAL],
                   powers.fourth[OUTPUT]);
  }

  template <Output OUTPUT>
  static SPARSECOD_INLINE void add_row_checked(double* totals, const Rows<T>& row, double inverse_width) {
    CheckedRowSums sums;
    Checked<CheckedRowSums> first{sums};
    add_columns<1, OUTPUT>(first, row, 0, row.width);
    double mean[NUM_OPERANDS];
    for (int i = 0; i < NUM_OPERANDS; ++i) mean[i] = sums.mean(i, inverse_width);
    RowPowers<double> powers(mean);
    Checked<RowPowers<double>> second{powers};
    add_columns<1, KEPT>(second, row, 0, row.width);
    add_row(totals, powers, inverse_width);
    add_checked(totals, sums);
  }

  static SPARSECOD_INLINE void add_rows(double* totals, const Rows<T>& rows, int64_t count) {
    const double inverse_width = 1.0 / rows.width;
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < count; ++i) add_row_checked<WRITTEN>(totals, rows.from(i), inverse_width);
    } else {
      Largest largest;
      for (int64_t i = 0; i < count; ++i) {
        const Rows<T> row = rows.from(i);
        Largest with_row = largest;
        const RowPowers<double> powers = sweep(with_row, row, inverse_width);
        if (float32_suffices(powers, inverse_width) && !cancels(powers)) {
          add_row(totals, powers, inverse_width);
          largest = with_row;
        } else {
          add_row_checked<KEPT>(totals, row, inverse_width);
        }
      }
      add_largest(totals, BRANCH, larger(largest.lanes.branch.fold(), largest.rest.branch.fold()));
      add_largest(totals, RESIDUAL, larger(largest.lanes.residual.fold(), largest.rest.residual.fold()));
      add_largest(totals, OUTPUT, larger(largest.lanes.output.fold(), largest.rest.output.fold()));
    }
  }
};

template <typename T>
struct AddRows {
  template <int N>
  static SPARSECOD_INLINE void run(double* totals, const Rows<T>& rows, int64_t count) {
    if (rows.bias == nullptr) {
      Kernel<T, N, false>::add_rows(totals, rows, count);
    } else {
      Kernel<T, N, true>::add_rows(totals, rows, count);
    }
  }
};

template <typename T>
void add_moments(double* moments, const Rows<T>& rows, int64_t count) {
  static const auto add_rows = best_instruction_set<AddRows<T>, double*, const Rows<T>&, int64_t>();
  const int64_t rows_per_block = std::max(at::divup(ELEMENTS_PER_BLOCK, rows.width), at::divup(count, MAX_BLOCKS));
  std::vector<std::array<double, NUM_MOMENTS>> blocks(at::divup(count, rows_per_block));
  at::parallel_for(0, blocks.size(), BLOCKS_PER_THREAD, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * rows_per_block;
      blocks[block].fill(0);
      add_rows(blocks[block].data(), rows.from(row), std::min(rows_per_block, count - row));
    }
  });
  for (const auto& block : blocks) merge_moments(moments, block.data());
}

}  // namespace

at::Tensor residual_add_moments(const at::Tensor& branch, const at::Tensor& residual,
                                const std::optional<at::Tensor>& bias, at::Tensor& moments) {
  at::Tensor output = at::empty(branch.sizes(), branch.options());
  if (output.numel() == 0) return output;
  const at::Tensor branch_rows = branch.contiguous(), residual_rows = residual.contiguous();
  const at::Tensor bias_row = bias ? bias->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, branch.scalar_type(), "residual_add_moments", [&] {
    const Rows<scalar_t> rows = {branch_rows.const_data_ptr<scalar_t>(), residual_rows.const_data_ptr<scalar_t>(),
                                 bias ? bias_row.const_data_ptr<scalar_t>() : nullptr,
                                 output.mutable_data_ptr<scalar_t>(), branch.size(-1)};
    add_moments(moments.mutable_data_ptr<double>(), rows, output.numel() / rows.width);
  });
  return output;
}

}  // namespace sparsecod::cpu
