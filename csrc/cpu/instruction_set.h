// Kernels compiled once per instruction set. PyTorch's own choice (ATEN_CPU_CAPABILITY) says which one runs.

#pragma once

#include <ATen/Version.h>

#include <string>

namespace sparsecod::cpu {

// Kernel::run<N>(arguments...) works in lanes of N float32; it and all it calls are inlined into these.
template <typename Kernel, typename... Arguments>
void run_baseline(Arguments... arguments) {
  Kernel::template run<4>(arguments...);
}

#if defined(__x86_64__)
template <typename Kernel, typename... Arguments>
__attribute__((target("avx2,fma"))) void run_avx2(Arguments... arguments) {
  Kernel::template run<8>(arguments...);
}

template <typename Kernel, typename... Arguments>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void run_avx512(Arguments... arguments) {
  Kernel::template run<16>(arguments...);
}
#endif

// The kernel for this processor: asks for strings, so ask once.
template <typename Kernel, typename... Arguments>
auto best_instruction_set() -> void (*)(Arguments...) {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return run_avx512<Kernel, Arguments...>;
  if (capability == "AVX2") return run_avx2<Kernel, Arguments...>;
#endif
  return run_baseline<Kernel, Arguments...>;
}

}  // namespace sparsecod::cpu
