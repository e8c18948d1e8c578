// Lanes of any CPU: the compilers' portable vector types, and how columns of a row get in and out of them.
//
// Every function here is compiled into its callers, once per instruction set: lanes wider than the baseline's registers
// must not cross a call.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/moments.h"

#define SPARSECOD_INLINE inline __attribute__((always_inline))

namespace sparsecod {

template <typename Real, int N>
struct LanesOf {
  typedef Real type __attribute__((vector_size(sizeof(Real) * N)));
};
template <typename Real>
struct LanesOf<Real, 1> {
  typedef Real type;
};
template <typename Real, int N>
using Lanes = typename LanesOf<Real, N>::type;

struct Sum {
  template <typename V>
  SPARSECOD_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

struct Larger {
  template <typename V>
  SPARSECOD_INLINE V operator()(V a, V b) const {
    return larger(a, b);
  }
};

// Combines the upper half of the lanes with the lower.
template <typename Real, int N, typename Combine>
SPARSECOD_INLINE Lanes<Real, N / 2> halve(Lanes<Real, N> x, Combine combine) {
  Lanes<Real, N / 2> halves[2];
  std::memcpy(halves, &x, sizeof(x));
  return combine(halves[0], halves[1]);
}

// Combines all lanes, pairwise.
template <typename Real, int N, typename Combine>
SPARSECOD_INLINE Real fold(Lanes<Real, N> x, Combine combine) {
  if constexpr (N == 1) {
    return x;
  } else {
    return fold<Real, N / 2>(halve<Real, N>(x, combine), combine);
  }
}

// A sum in float64 of packs of N float32 lanes. It has half as many lanes, which fill as wide a register.
template <int N>
class WideSum {
 public:
  SPARSECOD_INLINE void add(Lanes<float, N> x) {
    if constexpr (N == 1) {
      lanes_ += x;
    } else {
      lanes_ += __builtin_convertvector(halve<float, N>(x, Sum{}), Lanes<double, N / 2>);
    }
  }

  SPARSECOD_INLINE double total() const { return fold<double, WIDTH>(lanes_, Sum{}); }

 private:
  static constexpr int WIDTH = N == 1 ? 1 : N / 2;
  Lanes<double, WIDTH> lanes_{};
};

// A sum of packs of N float64 lanes.
template <int N>
class DoubleSum {
 public:
  SPARSECOD_INLINE void add(Lanes<double, N> x) { lanes_ += x; }
  SPARSECOD_INLINE double total() const { return fold<double, N>(lanes_, Sum{}); }

 private:
  Lanes<double, N> lanes_{};
};

// A sum in float64 of packs of N lanes of Real.
template <typename Real, int N>
using SumOf = std::conditional_t<std::is_same_v<Real, double>, DoubleSum<N>, WideSum<N>>;

// Neighbouring columns of a row as packs of N lanes, in the arithmetic in which they are added: float32, and float64
// for float64. Which column sits in which lane is left to the dtype, for moments do not depend on the order of columns.
template <typename T, int N, bool PAIRED = std::is_same_v<T, c10::BFloat16> && (N > 1)>
struct Columns {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int PACKS = 1, COUNT = N;
  Lanes<Real, N> packs[PACKS];

  SPARSECOD_INLINE void load(const T* columns) {
    Lanes<Real, N> pack;  // through a local, or the compiler takes it through memory
    if constexpr (std::is_same_v<T, Real>) {
      std::memcpy(&pack, columns, sizeof(pack));
    } else {
      Real values[N];
      for (int i = 0; i < N; ++i) values[i] = static_cast<Real>(columns[i]);
      std::memcpy(&pack, values, sizeof(pack));
    }
    packs[0] = pack;
  }

  SPARSECOD_INLINE void store(T* columns) const {
    const Lanes<Real, N> pack = packs[0];
    if constexpr (std::is_same_v<T, Real>) {
      std::memcpy(columns, &pack, sizeof(pack));
    } else {
      Real values[N];
      std::memcpy(values, &pack, sizeof(pack));
      for (int i = 0; i < N; ++i) columns[i] = static_cast<T>(values[i]);
    }
  }
};

// The largest magnitude of columns, lane by lane. LOADED: as Columns loads them, which may be cheaper to compare.
template <typename T, int N, bool LOADED, bool PAIRED = std::is_same_v<T, c10::BFloat16> && (N > 1)>
struct LargestMagnitude {
  Lanes<float, N> lanes{};

  SPARSECOD_INLINE void add(const Columns<T, N>& columns) {
    for (const auto& pack : columns.packs) lanes = larger(magnitude(pack), lanes);
  }

  SPARSECOD_INLINE float fold() const { return sparsecod::fold<float, N>(lanes, Larger{}); }
};

// bfloat16 is the upper half of a float32: even columns are the lower halves of words, odd columns the upper ones, and
// one instruction makes a pack of either.
template <int N>
struct Columns<c10::BFloat16, N, true> {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  using Real = float;
  using Words = Lanes<uint32_t, N>;
  static constexpr int PACKS = 2, COUNT = 2 * N;
  static constexpr uint32_t UPPER = 0xffff0000u;
  Lanes<float, N> packs[PACKS];
  Words words;  // as loaded

  SPARSECOD_INLINE void load(const c10::BFloat16* columns) {
    std::memcpy(&words, columns, sizeof(words));
    packs[0] = as<Lanes<float, N>>(words << 16);
    packs[1] = as<Lanes<float, N>>(words & UPPER);
  }

  SPARSECOD_INLINE void store(c10::BFloat16* columns) const {
    const Words words = (rounded(packs[0]) >> 16) | (rounded(packs[1]) & UPPER);
    std::memcpy(columns, &words, sizeof(words));
  }

 private:
  template <typename To, typename From>
  static SPARSECOD_INLINE To as(From x) {
    To bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
  }

  // Nearest, ties to even, in the upper half of each word. The carry spares NaN: one that comes from bfloat16 or from
  // adding infinities has an empty lower half.
  static SPARSECOD_INLINE Words rounded(Lanes<float, N> x) {
    const Words bits = as<Words>(x);  // two shifts get the lowest bit kept, for want of a register for a mask
    return bits + (((bits << 15) >> 31) + 0x7fffu);
  }
};

// Without their signs, the bits of finite numbers are in the order of their magnitudes.
template <int N>
struct LargestMagnitude<c10::BFloat16, N, true, true> {
  using Bits = Lanes<uint16_t, 2 * N>;
  Bits bits{};

  SPARSECOD_INLINE void add(const Columns<c10::BFloat16, N>& columns) {
    Bits given;
    std::memcpy(&given, &columns.words, sizeof(given));
    bits = larger(Bits(given << 1), bits);  // no register for a mask
  }

  SPARSECOD_INLINE float fold() const {
    const uint16_t largest = sparsecod::fold<uint16_t, 2 * N>(bits, Larger{});
    return c10::BFloat16(largest >> 1, c10::BFloat16::from_bits());
  }
};

}  // namespace sparsecod
