// Products of small matrices that lie in cache.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace sparsecod::cpu {

// A [rows, depth], of any strides, and B [depth, columns], whose rows are `pitch` apart.
template <typename Real>
struct Factors {
  const Real* left;
  int64_t row_stride, step;
  const Real* right;
  int64_t pitch;

  SPARSECOD_INLINE Factors from(int64_t row, int64_t depth, int64_t column) const {
    return {left + row * row_stride + depth * step, row_stride, step, right + depth * pitch + column, pitch};
  }
};

// In lanes of N.
template <typename Real, int N>
struct SmallProduct {
  using V = Lanes<Real, N>;
  static constexpr int64_t COLUMNS = 2 * N;  // at a time, by up to ROWS rows: as many sums as registers hold
  static constexpr int ROWS = 6;
  static constexpr int64_t MAX_DEPTH = 64;  // products added up in one chain, before the sum joins others

  static SPARSECOD_INLINE V load(const Real* from) {
    V pack;
    std::memcpy(&pack, from, sizeof(pack));
    return pack;
  }
  static SPARSECOD_INLINE void store(Real* to, V pack) { std::memcpy(to, &pack, sizeof(pack)); }

  // C [rows, columns] += the sum of A B over `factors`, or = if `fresh`; columns are a multiple of COLUMNS.
  template <size_t COUNT>
  static SPARSECOD_INLINE void add(Real* c, int64_t c_pitch, const Factors<Real> (&factors)[COUNT], int64_t rows,
                                   int64_t columns, int64_t depth, bool fresh) {
    for (int64_t first = 0; first < depth; first += MAX_DEPTH / COUNT) {
      const int64_t deep = std::min<int64_t>(MAX_DEPTH / COUNT, depth - first);
      for (int64_t column = 0; column < columns; column += COLUMNS) {
        Real* const to = c + column;
        const bool overwrite = fresh && first == 0;
        int64_t row = add_rows<ROWS>(0, to, c_pitch, factors, first, column, rows, deep, overwrite);
        row = add_rows<2>(row, to, c_pitch, factors, first, column, rows, deep, overwrite);
        add_rows<1>(row, to, c_pitch, factors, first, column, rows, deep, overwrite);
      }
    }
  }

 private:
  // Takes rows from `row` on, COUNTED at a time, and returns the first that is left over.
  template <int COUNTED, size_t COUNT>
  static SPARSECOD_INLINE int64_t add_rows(int64_t row, Real* c, int64_t c_pitch, const Factors<Real> (&factors)[COUNT],
                                           int64_t first, int64_t column, int64_t rows, int64_t depth, bool overwrite) {
    for (; row + COUNTED <= rows; row += COUNTED) {
      V sums[COUNTED][2]{};
      for (const Factors<Real>& each : factors) {
        const Factors<Real> here = each.from(row, first, column);
        for (int64_t i = 0; i < depth; ++i) {
          const V left = load(here.right + i * here.pitch), right = load(here.right + i * here.pitch + N);
          for (int j = 0; j < COUNTED; ++j) {
            const V factor = V{} + here.left[j * here.row_stride + i * here.step];
            sums[j][0] += factor * left;
            sums[j][1] += factor * right;
          }
        }
      }
      for (int j = 0; j < COUNTED; ++j) {
        Real* const to = c + (row + j) * c_pitch;
        for (int half = 0; half < 2; ++half) {
          store(to + half * N, overwrite ? sums[j][half] : load(to + half * N) + sums[j][half]);
        }
      }
    }
    return row;
  }
};

}  // namespace sparsecod::cpu
