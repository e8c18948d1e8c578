// Power sums of the columns of y, about a shift: from them come the central moments of each dimension (Eq. 19).

#pragma once

#include "host_device.h"

namespace sparsecod {

// Rows of the columns buffer [NUM_COLUMN_SUMS, D]; sparsecod_mcore.ops.ColumnSum is the same list.
#define SPARSECOD_COLUMN_SUMS(X) \
  X(SHIFT)  /* set by the caller, values of float32 */ \
  X(FIRST)  /* sum over tokens of y - shift */ \
  X(SECOND) /* of its square, */ \
  X(THIRD)  /* cube, */ \
  X(FOURTH) /* and fourth power */

#define SPARSECOD_ENUMERATE(name) name,
enum ColumnSum : int { SPARSECOD_COLUMN_SUMS(SPARSECOD_ENUMERATE) NUM_COLUMN_SUMS };
#undef SPARSECOD_ENUMERATE

constexpr int NUM_POWERS = 4;  // FIRST to FOURTH

template <typename V>
SPARSECOD_HOST_DEVICE void add_powers(V (&sums)[NUM_POWERS], V distance) {
  const V square = distance * distance;
  sums[0] += distance;
  sums[1] += square;
  sums[2] += square * distance;
  sums[3] += square * square;
}

}  // namespace sparsecod
