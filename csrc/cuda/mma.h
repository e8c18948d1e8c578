// Tensor-core products of one warp, and the copies that feed them.
//
// A warp multiplies A [16, 16] by B [16, 8] into float32 D [16, 8]. With g = lane / 4 and t = lane % 4, a lane holds
// (register: elements, lower half first)
//   A  0: (g, 2t) (g, 2t+1)   1: (g+8, 2t) (g+8, 2t+1)   2: (g, 2t+8) (g, 2t+9)   3: (g+8, 2t+8) (g+8, 2t+9)
//   B  0: (2t, g) (2t+1, g)   1: (2t+8, g) (2t+9, g)
//   D  0: (g, 2t)   1: (g, 2t+1)   2: (g+8, 2t)   3: (g+8, 2t+1)
// so that D of two neighbouring products, rounded, is A of the next: what attention does with its weights.

#pragma once

#include "element.h"

namespace sparsecod::cuda {

using FragmentA = uint32_t[4];
using FragmentB = uint32_t[2];
using FragmentD = float[4];

// Two neighbours as one register of a fragment.
template <typename T>
__device__ __forceinline__ uint32_t pair(float lower, float upper) {
  const T elements[2] = {from_real<T>(lower), from_real<T>(upper)};
  uint32_t bits;
  std::memcpy(&bits, elements, sizeof(bits));
  return bits;
}

#if defined(SPARSECOD_EMULATOR)

namespace emulated {

template <typename T>
float element(const uint32_t* registers, int index) {
  T halves[2];
  std::memcpy(halves, registers + index / 2, sizeof(halves));
  return to_real(halves[index % 2]);
}

}  // namespace emulated

// d += a b.
template <typename T>
void multiply(FragmentD& d, const FragmentA& a, const FragmentB& b) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const unsigned char* lanes = ::sparsecod::emulator::exchange("mma", WHOLE_WARP, &mine, sizeof(mine));
  const auto of = [&](int lane) {
    Operands theirs;
    std::memcpy(&theirs, lanes + lane * ::sparsecod::emulator::LANE_BYTES, sizeof(theirs));
    return theirs;
  };
  const int lane = ::sparsecod::emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Operands in_row = of(row % 8 * 4 + k % 8 / 2), in_column = of(column * 4 + k % 8 / 2);
      d[i] += emulated::element<T>(in_row.a, (k / 8 * 2 + row / 8) * 2 + k % 2) *
              emulated::element<T>(in_column.b, k / 8 * 2 + k % 2);
    }
  }
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 i + j gives the address of row j of matrix i,
// which is aligned to 16 bytes. Register i holds elements (g, 2t) and (g, 2t+1) of matrix i, of its transpose if
// TRANSPOSED.
template <bool TRANSPOSED>
void load_matrices(uint32_t (&registers)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) ::sparsecod::emulator::fail("ldmatrix at %p, not aligned to 16 bytes", row);
  ::sparsecod::emulator::check_shared("ldmatrix", row, 16);
  const unsigned char* lanes = ::sparsecod::emulator::exchange("ldmatrix", WHOLE_WARP, &row, sizeof(row));
  const int lane = ::sparsecod::emulator::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t halves[2];
    for (int half = 0; half < 2; ++half) {
      const int down = lane / 4, across = lane % 4 * 2 + half;
      const uint16_t* matrix_row;
      std::memcpy(&matrix_row, lanes + (8 * i + (TRANSPOSED ? across : down)) * ::sparsecod::emulator::LANE_BYTES,
                  sizeof(matrix_row));
      halves[half] = matrix_row[TRANSPOSED ? down : across];
    }
    std::memcpy(&registers[i], halves, sizeof(halves));
  }
}

// Starts to copy 16 bytes, both ends aligned to 16, or to write zeros if not `valid`.
inline void copy_async(void* shared, const void* global, bool valid = true) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) {
    ::sparsecod::emulator::fail("cp.async between %p and %p, not aligned to 16 bytes", shared, global);
  }
  ::sparsecod::emulator::copy_async(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}
inline void commit_copies() { ::sparsecod::emulator::commit_copies(); }
template <int GROUPS_UNDER_WAY>
void wait_for_copies() {
  ::sparsecod::emulator::wait_for_copies(GROUPS_UNDER_WAY);
}

#else

template <typename T>
__device__ __forceinline__ void multiply(FragmentD& d, const FragmentA& a, const FragmentB& b) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS_UNDER_WAY>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_UNDER_WAY) : "memory");
}

#endif

}  // namespace sparsecod::cuda
