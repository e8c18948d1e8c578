// Rows of a residual add as threads see them: in registers, or read anew for each sweep.

#pragma once

#include "element.h"

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

}  // namespace
}  // namespace sparsecod::cuda
