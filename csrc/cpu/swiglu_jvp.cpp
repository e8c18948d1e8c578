// y = silu(gate) * up and its tangents, row by row.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "../common/dual.h"
#include "exponential.h"
#include "instruction_set.h"
#include "operators.h"

namespace sparsecod::cpu {
namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 8192;  // fewer are not worth waking one

template <typename T>
struct Rows {
  const T *gate_up, *gate_up_tangent;
  T *output, *output_tangent;
  int64_t width, probes, probe_stride;  // of outputs

  SPARSECOD_INLINE Rows from(int64_t row) const {
    return {gate_up + 2 * row * width,
            gate_up_tangent + 2 * row * width,
            output + row * width,
            output_tangent + row * width,
            width,
            probes,
            probe_stride};
  }
};

template <typename T>
struct SwigluRows {
  template <int N>
  static SPARSECOD_INLINE void run(const Rows<T>& rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const Rows<T> row = rows.from(i);
      const int64_t rest = columns<N>(row, 0);
      if (rest < row.width) columns<1>(row, rest);
    }
  }

 private:
  // Takes columns from `column` on, N at a time, and returns the first that is left over.
  template <int N>
  static SPARSECOD_INLINE int64_t columns(const Rows<T>& row, int64_t column) {
    using Block = Columns<T, N>;
    using Real = typename Block::Real;
    using V = Lanes<Real, N>;
    for (; column + Block::COUNT <= row.width; column += Block::COUNT) {
      Block gate, up, output{};
      gate.load(row.gate_up + column);
      up.load(row.gate_up + row.width + column);
      V sigmoid[Block::PACKS];
      for (int i = 0; i < Block::PACKS; ++i) sigmoid[i] = 1 / (1 + exponential<Real, N>(-gate.packs[i]));
      for (int64_t probe = 0; probe < row.probes; ++probe) {
        const T* const tangent = row.gate_up_tangent + 2 * probe * row.probe_stride + column;
        Block gate_tangent, up_tangent, output_tangent;
        gate_tangent.load(tangent);
        up_tangent.load(tangent + row.width);
        for (int i = 0; i < Block::PACKS; ++i) {
          const Dual<V> a = {gate.packs[i], gate_tangent.packs[i]}, b = {up.packs[i], up_tangent.packs[i]};
          const Dual<V> product = silu(a, sigmoid[i]) * b;
          output.packs[i] = product.value;
          output_tangent.packs[i] = product.tangent;
        }
        output_tangent.store(row.output_tangent + probe * row.probe_stride + column);
      }
      output.store(row.output + column);
    }
    return column;
  }
};

}  // namespace

void swiglu_jvp(const at::Tensor& gate_up, const at::Tensor& gate_up_tangent, const at::Tensor& output,
                const at::Tensor& output_tangent) {
  const int64_t width = output.size(-1), count = output.numel() / width;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "swiglu_jvp", [&] {
    static const auto swiglu_rows = best_instruction_set<SwigluRows<scalar_t>, const Rows<scalar_t>&, int64_t>();
    const Rows<scalar_t> rows = {gate_up.const_data_ptr<scalar_t>(), gate_up_tangent.const_data_ptr<scalar_t>(),
                                 output.mutable_data_ptr<scalar_t>(), output_tangent.mutable_data_ptr<scalar_t>(),
                                 width, output_tangent.numel() / output.numel(), output.numel()};
    at::parallel_for(0, count, at::divup(ELEMENTS_PER_THREAD, width),
                     [&](int64_t begin, int64_t end) { swiglu_rows(rows.from(begin), end - begin); });
  });
}

}  // namespace sparsecod::cpu
