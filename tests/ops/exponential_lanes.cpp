// The exponential of csrc/cpu/exponential.h for a test, in lanes of every instruction set.

#include "exponential.h"

namespace {

template <int N>
SPARSECOD_INLINE void all(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += N) {
    sparsecod::Lanes<float, N> lanes;
    std::memcpy(&lanes, x + i, sizeof(lanes));
    lanes = sparsecod::exponential<float, N>(lanes);
    std::memcpy(y + i, &lanes, sizeof(lanes));
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void all_avx2(const float* x, float* y, int64_t count) { all<8>(x, y, count); }

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void all_avx512(const float* x, float* y,
                                                                                  int64_t count) {
  all<16>(x, y, count);
}
#endif

}  // namespace

// x [count] -> y [count], in so many lanes; false where this processor has no such lanes.
extern "C" bool exponential_in_lanes(int lanes, const float* x, float* y, int64_t count) {
  switch (lanes) {
    case 1: all<1>(x, y, count); return true;
    case 4: all<4>(x, y, count); return true;
#if defined(__x86_64__)
    case 8:
      if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
      all_avx2(x, y, count);
      return true;
    case 16:
      if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return false;
      all_avx512(x, y, count);
      return true;
#endif
  }
  return false;
}
