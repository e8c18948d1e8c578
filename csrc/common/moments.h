// Moments of the residual add: the maths of one row, that is one token's D columns, for CPU and CUDA kernels.
//
// Accumulators are generic over V, which is float or double in a CUDA thread and a vector of lanes on the CPU. They use
// operators and ?: only, which compilers give to scalars and to vectors alike.
//
// A row is read twice while it is in cache: first for its sums and largest magnitudes, then for powers of the distances
// to its mean. Raw power sums would lose every digit where the mean is large against the spread.

#pragma once

#include <limits>
#include <type_traits>

#include "host_device.h"

// clang-format off
#define SPARSECOD_OPERAND_MOMENTS(X, OPERAND) \
  X(OPERAND##_VARIANCE)       /* sum over tokens of the population variance over D */ \
  X(OPERAND##_SQUARED_MEAN)   /* sum over tokens of the squared mean over D */ \
  X(OPERAND##_FOURTH_MOMENT)  /* sum over tokens of the 4th central moment over D */ \
  X(OPERAND##_KURTOSIS)       /* sum over tokens of 4th central moment / variance^2; 0 for a constant row */ \
  X(OPERAND##_MAX)            /* largest |x| among finite elements */ \
  X(OPERAND##_NONFINITE)      /* number of elements that are NaN or infinite */

#define SPARSECOD_MOMENTS(X) \
  SPARSECOD_OPERAND_MOMENTS(X, BRANCH) \
  SPARSECOD_OPERAND_MOMENTS(X, RESIDUAL) \
  SPARSECOD_OPERAND_MOMENTS(X, OUTPUT) \
  X(COVARIANCE)               /* sum over tokens of the covariance of branch and residual over D */ \
  X(TOKENS)                   /* number of tokens */
// clang-format on

namespace sparsecod {

enum Operand : int { BRANCH, RESIDUAL, OUTPUT, NUM_OPERANDS };

// Index into the moments buffer; sparsecod_mcore.ops.Moment is the same list.
#define SPARSECOD_ENUMERATE(name) name,
enum Moment : int { SPARSECOD_MOMENTS(SPARSECOD_ENUMERATE) NUM_MOMENTS };
#undef SPARSECOD_ENUMERATE

constexpr int MOMENTS_PER_OPERAND = RESIDUAL_VARIANCE - BRANCH_VARIANCE;

template <typename V>
SPARSECOD_HOST_DEVICE V smaller(V a, V b) {
  return a < b ? a : b;
}

template <typename V>
SPARSECOD_HOST_DEVICE V larger(V a, V b) {
#if defined(__CUDA_ARCH__)  // one instruction; b too if a is NaN
  if constexpr (std::is_same_v<V, float>) return fmaxf(a, b);
#endif
  return a > b ? a : b;
}

template <typename V>
SPARSECOD_HOST_DEVICE V magnitude(V x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<V, float>) return fabsf(x);
#endif
  if constexpr (std::is_floating_point_v<V>) {
    return x < 0 ? -x : x;
  } else {  // clears the sign bits, in one instruction
    using Bits = decltype(x < x);
    return (V)((Bits)x & ~(Bits)(-V{}));
  }
}

// First sweep over a row that turns out finite, which `float32_suffices` tells.
template <typename V>
struct RowSums {
  V sum[NUM_OPERANDS], largest[NUM_OPERANDS];

  // Goes on from the largest magnitudes of earlier rows, which then need not be folded out of their lanes row by row.
  SPARSECOD_HOST_DEVICE explicit RowSums(const V (&largest_so_far)[NUM_OPERANDS]) {
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      sum[i] = V{};
      largest[i] = largest_so_far[i];
    }
  }

  SPARSECOD_HOST_DEVICE void add(V branch, V residual, V output) {
    const V operands[NUM_OPERANDS] = {branch, residual, output};
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      sum[i] += operands[i];
      largest[i] = larger(magnitude(operands[i]), largest[i]);
    }
  }
};

// First sweep over any row. Counts elements that are not finite.
struct CheckedRowSums {
  double sum[NUM_OPERANDS], nonfinite[NUM_OPERANDS];
  double lowest[NUM_OPERANDS], highest[NUM_OPERANDS];  // among finite elements

  SPARSECOD_HOST_DEVICE CheckedRowSums() {
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      sum[i] = nonfinite[i] = 0;
      lowest[i] = std::numeric_limits<double>::infinity();
      highest[i] = -lowest[i];
    }
  }

  SPARSECOD_HOST_DEVICE void add(double branch, double residual, double output) {
    const double operands[NUM_OPERANDS] = {branch, residual, output};
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      const double x = operands[i];
      sum[i] += x;
      if (x - x == 0) {
        lowest[i] = smaller(x, lowest[i]);
        highest[i] = larger(x, highest[i]);
      } else {
        nonfinite[i] += 1;
      }
    }
  }

  // NaN if an element is not finite. Exact for a constant row, whose central powers are then exactly zero.
  SPARSECOD_HOST_DEVICE double mean(int operand, double inverse_width) const {
    if (nonfinite[operand] > 0) return std::numeric_limits<double>::quiet_NaN();
    return lowest[operand] == highest[operand] ? lowest[operand] : sum[operand] * inverse_width;
  }
};

// Second sweep: sums of (x - mean)^2 and (x - mean)^4, and of the product of branch's and residual's distances.
template <typename V>
struct RowPowers {
  V mean[NUM_OPERANDS];
  V second[NUM_OPERANDS], fourth[NUM_OPERANDS], product;

  template <typename Real>
  SPARSECOD_HOST_DEVICE explicit RowPowers(const Real (&row_mean)[NUM_OPERANDS]) : product{} {
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      mean[i] = V{} + row_mean[i];
      second[i] = fourth[i] = V{};
    }
  }

  SPARSECOD_HOST_DEVICE void add(V branch, V residual, V output) {
    add_distances(branch - mean[BRANCH], residual - mean[RESIDUAL], output - mean[OUTPUT]);
  }

  SPARSECOD_HOST_DEVICE void add_distances(V branch, V residual, V output) {
    const V distance[NUM_OPERANDS] = {branch, residual, output};
    for (int i = 0; i < NUM_OPERANDS; ++i) {
      const V square = distance[i] * distance[i];
      second[i] += square;
      fourth[i] += square * square;
    }
    product += distance[BRANCH] * distance[RESIDUAL];
  }
};

// Whether RowSums and RowPowers in float32 gave a row's moments to float32 accuracy. If not, the row needs
// CheckedRowSums and RowPowers in double: where an element is not finite, where powers leave float32's range, and where
// the mean is so large against the spread that rounding it to float32 (relative 2^-25) could move the fourth moment by
// more than 4 * 2^-25 * MAX_MEAN. Constant rows are of the last kind, but for rows of zeros.
SPARSECOD_HOST_DEVICE bool float32_suffices(const RowPowers<double>& powers, double inverse_width) {
  constexpr double MAX_MEAN = 16;  // in standard deviations
  constexpr double SMALLEST = 1e-28, LARGEST = std::numeric_limits<float>::max();
  bool suffices = true;
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    const double mean = powers.mean[i], second = powers.second[i], fourth = powers.fourth[i];
    const bool in_range = fourth >= SMALLEST && fourth <= LARGEST;
    const bool centred = mean * mean <= MAX_MEAN * MAX_MEAN * inverse_width * second;
    suffices &= (in_range && centred) || (mean == 0 && second == 0);
  }
  return suffices;
}

// What one row adds to the sums of one operand.
struct OperandSums {
  double variance, squared_mean, fourth_moment, kurtosis;
};

SPARSECOD_HOST_DEVICE OperandSums operand_sums(double mean, double second, double fourth, double inverse_width) {
  const double variance = second * inverse_width, fourth_moment = fourth * inverse_width;
  return {variance, mean * mean, fourth_moment, variance == 0 ? 0 : fourth_moment / (variance * variance)};
}

// Adds the sums of one row to the NUM_MOMENTS `totals`.
SPARSECOD_HOST_DEVICE void add_row(double* totals, const RowPowers<double>& powers, double inverse_width) {
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    const OperandSums sums = operand_sums(powers.mean[i], powers.second[i], powers.fourth[i], inverse_width);
    double* operand = totals + i * MOMENTS_PER_OPERAND;  // indexed by the names of the first operand
    operand[BRANCH_VARIANCE] += sums.variance;
    operand[BRANCH_SQUARED_MEAN] += sums.squared_mean;
    operand[BRANCH_FOURTH_MOMENT] += sums.fourth_moment;
    operand[BRANCH_KURTOSIS] += sums.kurtosis;
  }
  totals[COVARIANCE] += powers.product * inverse_width;
  totals[TOKENS] += 1;
}

SPARSECOD_HOST_DEVICE void add_largest(double* totals, int operand, double magnitude) {
  double& max = totals[operand * MOMENTS_PER_OPERAND + BRANCH_MAX];
  max = larger(magnitude, max);
}

SPARSECOD_HOST_DEVICE void add_checked(double* totals, const CheckedRowSums& sums) {
  for (int i = 0; i < NUM_OPERANDS; ++i) {
    add_largest(totals, i, larger(sums.highest[i], -sums.lowest[i]));
    totals[i * MOMENTS_PER_OPERAND + BRANCH_NONFINITE] += sums.nonfinite[i];
  }
}

SPARSECOD_HOST_DEVICE bool is_max(int moment) {
  return moment == BRANCH_MAX || moment == RESIDUAL_MAX || moment == OUTPUT_MAX;
}

// Adds the moments of other rows to `totals`.
SPARSECOD_HOST_DEVICE void merge_moments(double* totals, const double* others) {
  for (int i = 0; i < NUM_MOMENTS; ++i) totals[i] = is_max(i) ? larger(totals[i], others[i]) : totals[i] + others[i];
}

}  // namespace sparsecod
