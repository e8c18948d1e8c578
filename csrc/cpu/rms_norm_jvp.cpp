// y = w r x, with r = (mean x^2 + eps)^(-1/2), and its tangents, row by row: for each tangent one sweep for the sums
// and one for results, while the row is in cache.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "../common/rms_norm.h"
#include "instruction_set.h"
#include "lanes.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 8192;  // fewer are not worth waking one
// How many numbers a lane adds up in float32 before the sum goes to float64: few, for what is small against an outlier.
constexpr int64_t PACKS_PER_RUN = 8;

template <typename T, typename W>
struct Rows {
  const T *x, *x_tangent;
  const W* weight;
  T *y, *y_tangent;
  int64_t width, probes, probe_stride;
  double eps;

  SPARSECOD_INLINE Rows from(int64_t row) const { return moved(row * width, row * width); }
  SPARSECOD_INLINE Rows of_probe(int64_t probe) const { return moved(0, probe * probe_stride); }

 private:
  SPARSECOD_INLINE Rows moved(int64_t primal, int64_t tangent) const {
    return {x + primal, x_tangent + tangent, weight, y + primal, y_tangent + tangent, width, probes, probe_stride, eps};
  }
};

// Weights in the lanes in which Columns<T, N> has their columns.
template <typename T, typename W, int N>
struct Weights {
  using Block = Columns<T, N>;
  using Real = typename Block::Real;
  Block block;

  SPARSECOD_INLINE explicit Weights(const W* columns) {
    if constexpr (std::is_same_v<T, W>) {
      block.load(columns);
    } else {
      Real values[Block::PACKS][N];
      for (int lane = 0; lane < N; ++lane) {
        for (int pack = 0; pack < Block::PACKS; ++pack) {
          const Real value = static_cast<Real>(columns[Block::PACKS * lane + pack]);
          // Any NaN but this may round to a number in bfloat16: see Columns.
          values[pack][lane] = value == value ? value : std::numeric_limits<Real>::quiet_NaN();
        }
      }
      std::memcpy(block.packs, values, sizeof(values));
    }
  }
};

template <typename T, typename W>
struct RmsNormRows {
  template <int N>
  static SPARSECOD_INLINE void run(const Rows<T, W>& rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const Rows<T, W> row = rows.from(i);
      norm_row<N, true>(row);
      for (int64_t probe = 1; probe < row.probes; ++probe) norm_row<N, false>(row.of_probe(probe));
    }
  }

 private:
  template <int N, bool WRITES_PRIMAL>
  static SPARSECOD_INLINE void norm_row(const Rows<T, W>& row) {
    RmsNormSums<double> sums;
    int64_t rest = add_sums<N>(sums, row, 0);
    if (rest < row.width) add_sums<1>(sums, row, rest);
    const Dual<double> scale = rms_norm_scale<double>(sums, row.width, row.eps);
    rest = write<N, WRITES_PRIMAL>(scale, row, 0);
    if (rest < row.width) write<1, WRITES_PRIMAL>(scale, row, rest);
  }

  // Few left-over columns cost little in float64, and a row that has no others keeps its digits.
  template <int N>
  static SPARSECOD_INLINE int64_t add_sums(RmsNormSums<double>& sums, const Rows<T, W>& row, int64_t column) {
    using Block = Columns<T, N>;
    using Real = std::conditional_t<N == 1, double, typename Block::Real>;
    SumOf<Real, N> square, product;
    while (column + Block::COUNT <= row.width) {
      const int64_t end = std::min(column + PACKS_PER_RUN * N, row.width);
      RmsNormSums<Lanes<Real, N>> run[Block::PACKS];
      for (; column + Block::COUNT <= end; column += Block::COUNT) {
        Block x, x_tangent;
        x.load(row.x + column);
        x_tangent.load(row.x_tangent + column);
        for (int i = 0; i < Block::PACKS; ++i) run[i].add({x.packs[i], x_tangent.packs[i]});
      }
      for (int i = 0; i < Block::PACKS; ++i) {
        square.add(run[i].square);
        product.add(run[i].product);
      }
    }
    sums.square += square.total();
    sums.product += product.total();
    return column;
  }

  template <int N, bool WRITES_PRIMAL>
  static SPARSECOD_INLINE int64_t write(Dual<double> row_scale, const Rows<T, W>& row, int64_t column) {
    using Block = Columns<T, N>;
    using Real = typename Block::Real;
    using V = Lanes<Real, N>;
    const Dual<V> scale = {V{} + static_cast<Real>(row_scale.value), V{} + static_cast<Real>(row_scale.tangent)};
    for (; column + Block::COUNT <= row.width; column += Block::COUNT) {
      const Weights<T, W, N> weight(row.weight + column);
      Block x, x_tangent, y, y_tangent;
      x.load(row.x + column);
      x_tangent.load(row.x_tangent + column);
      for (int i = 0; i < Block::PACKS; ++i) {
        const Dual<V> normed = rms_norm<V>({x.packs[i], x_tangent.packs[i]}, scale, weight.block.packs[i]);
        y.packs[i] = normed.value;
        y_tangent.packs[i] = normed.tangent;
      }
      if constexpr (WRITES_PRIMAL) y.store(row.y + column);
      y_tangent.store(row.y_tangent + column);
    }
    return column;
  }
};

template <typename T, typename W>
void rms_norm_rows(const at::Tensor& x, const at::Tensor& x_tangent, const at::Tensor& weight, double eps,
                   const at::Tensor& y, const at::Tensor& y_tangent) {
  static const auto rms_norm_rows = best_instruction_set<RmsNormRows<T, W>, const Rows<T, W>&, int64_t>();
  const Rows<T, W> rows = {x.const_data_ptr<T>(),
                           x_tangent.const_data_ptr<T>(),
                           weight.const_data_ptr<W>(),
                           y.mutable_data_ptr<T>(),
                           y_tangent.mutable_data_ptr<T>(),
                           weight.numel(),
                           x_tangent.numel() / x.numel(),
                           x.numel(),
                           eps};
  at::parallel_for(0, x.numel() / rows.width, at::divup(ELEMENTS_PER_THREAD, rows.width),
                   [&](int64_t begin, int64_t end) { rms_norm_rows(rows.from(begin), end - begin); });
}

}  // namespace

void rms_norm_jvp(const at::Tensor& x, const at::Tensor& x_tangent, const at::Tensor& weight, double eps,
                  const at::Tensor& y, const at::Tensor& y_tangent) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rms_norm_jvp", [&] {
    if (weight.scalar_type() == x.scalar_type()) {
      rms_norm_rows<scalar_t, scalar_t>(x, x_tangent, weight, eps, y, y_tangent);
    } else {
      rms_norm_rows<scalar_t, float>(x, x_tangent, weight, eps, y, y_tangent);
    }
  });
}

}  // namespace sparsecod::cpu
