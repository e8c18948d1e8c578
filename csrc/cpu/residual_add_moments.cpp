// y = branch + bias + residual and, while a row is in cache, the moments of all three.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

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

  SPARSECOD_INLINE void prefetch_below(int64_t column) const {
    __builtin_prefetch(branch + width + column);
    __builtin_prefetch(residual + width + column);
    __builtin_prefetch(output + width + column, 1);
  }
};

// Compiled for elements of type T, taken N at a time; columns left over at a row's end are taken one by one.
template <typename T, int N, bool HAS_BIAS>
struct Kernel {
  enum Output { KEPT, WRITTEN };

  // Largest magnitude of each operand, in lanes and among left-over columns, over any number of rows.
  struct Largest {
    Lanes<float, N> lanes[NUM_OPERANDS]{};
    float rest[NUM_OPERANDS]{};
  };

  // Feeds columns [begin, end) of a row to sums.add(), M at a time, and returns the first column that is left over.
  template <int M, Output OUTPUT, typename Sums>
  static SPARSECOD_INLINE int64_t add_columns(Sums& sums, const Rows<T>& row, int64_t begin, int64_t end) {
    using Block = Columns<T, M>;
    int64_t column = begin;
    for (; column + Block::COUNT <= end; column += Block::COUNT) {
      Block branch, residual, output;
      branch.load(row.branch + column);
      residual.load(row.residual + column);
      if constexpr (HAS_BIAS) {
        Block bias;
        bias.load(row.bias + column);
        for (int i = 0; i < Block::PACKS; ++i) branch.packs[i] += bias.packs[i];
      }
      for (int i = 0; i < Block::PACKS; ++i) {
        output.packs[i] = branch.packs[i] + residual.packs[i];
        sums.add(branch.packs[i], residual.packs[i], output.packs[i]);
      }
      if constexpr (OUTPUT == WRITTEN) {
        output.store(row.output + column);
      } else if constexpr (M > 1) {
        row.prefetch_below(column);  // the second sweep reads from cache and leaves the memory idle
      }
    }
    return column;
  }

  template <int M>
  static SPARSECOD_INLINE int64_t add_sums(double (&sum)[NUM_OPERANDS], Lanes<float, M> (&largest)[NUM_OPERANDS],
                                           const Rows<T>& row, int64_t column) {
    WideSum<M> wide[NUM_OPERANDS];
    while (column + Columns<T, M>::COUNT <= row.width) {
      RowSums<Lanes<float, M>> run(largest);
      column = add_columns<M, WRITTEN>(run, row, column, std::min(column + PACKS_PER_RUN * M, row.width));
      for (int i = 0; i < NUM_OPERANDS; ++i) {
        wide[i].add(run.sum[i]);
        largest[i] = run.largest[i];
      }
    }
    for (int i = 0; i < NUM_OPERANDS; ++i) sum[i] += wide[i].total();
    return column;
  }

  template <int M>
  static SPARSECOD_INLINE int64_t add_powers(RowPowers<double>& powers, const Rows<T>& row, int64_t column) {
    float mean[NUM_OPERANDS];
    for (int i = 0; i < NUM_OPERANDS; ++i) mean[i] = static_cast<float>(powers.mean[i]);
    WideSum<M> second[NUM_OPERANDS], fourth[NUM_OPERANDS], product;
    while (column + Columns<T, M>::COUNT <= row.width) {
      RowPowers<Lanes<float, M>> run(mean);
      column = add_columns<M, KEPT>(run, row, column, std::min(column + PACKS_PER_RUN * M, row.width));
      for (int i = 0; i < NUM_OPERANDS; ++i) {
        second[i].add(run.second[i]);
        fourth[i].add(run.fourth[i]);
      }
      product.add(run.product);
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
    int64_t rest = add_sums<N>(sum, largest.lanes, row, 0);
    if (rest < row.width) add_sums<1>(sum, largest.rest, row, rest);
    for (int i = 0; i < NUM_OPERANDS; ++i) mean[i] = sum[i] * inverse_width;
    RowPowers<double> powers(mean);
    rest = add_powers<N>(powers, row, 0);
    if (rest < row.width) add_powers<1>(powers, row, rest);
    return powers;
  }

  template <Output OUTPUT>
  static SPARSECOD_INLINE void add_row_checked(double* totals, const Rows<T>& row, double inverse_width) {
    CheckedRowSums sums;
    add_columns<1, OUTPUT>(sums, row, 0, row.width);
    double mean[NUM_OPERANDS];
    for (int i = 0; i < NUM_OPERANDS; ++i) mean[i] = sums.mean(i, inverse_width);
    RowPowers<double> powers(mean);
    add_columns<1, KEPT>(powers, row, 0, row.width);
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
        if (float32_suffices(powers, inverse_width)) {
          add_row(totals, powers, inverse_width);
          largest = with_row;
        } else {
          add_row_checked<KEPT>(totals, row, inverse_width);
        }
      }
      for (int i = 0; i < NUM_OPERANDS; ++i) {
        add_largest(totals, i, larger(fold<float, N>(largest.lanes[i], Larger{}), largest.rest[i]));
      }
    }
  }
};

template <int N, typename T>
SPARSECOD_INLINE void add_rows_in_lanes(double* totals, const Rows<T>& rows, int64_t count) {
  if (rows.bias == nullptr) {
    Kernel<T, N, false>::add_rows(totals, rows, count);
  } else {
    Kernel<T, N, true>::add_rows(totals, rows, count);
  }
}

// The kernel is compiled once per instruction set. PyTorch's own choice (ATEN_CPU_CAPABILITY) says which one runs.
template <typename T>
using AddRows = void (*)(double* totals, const Rows<T>& rows, int64_t count);

template <typename T>
void add_rows_baseline(double* totals, const Rows<T>& rows, int64_t count) {
  add_rows_in_lanes<4>(totals, rows, count);
}

#if defined(__x86_64__)
template <typename T>
__attribute__((target("avx2,fma"))) void add_rows_avx2(double* totals, const Rows<T>& rows, int64_t count) {
  add_rows_in_lanes<8>(totals, rows, count);
}

template <typename T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void add_rows_avx512(double* totals,
                                                                                       const Rows<T>& rows,
                                                                                       int64_t count) {
  add_rows_in_lanes<16>(totals, rows, count);
}
#endif

template <typename T>
AddRows<T> best_add_rows() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return add_rows_avx512<T>;
  if (capability == "AVX2") return add_rows_avx2<T>;
#endif
  return add_rows_baseline<T>;
}

template <typename T>
void add_moments(double* moments, const Rows<T>& rows, int64_t count) {
  static const AddRows<T> add_rows = best_add_rows<T>();
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
