// Which kernel serves which operator on which device. The schemas are in densreg/ops.py.
#include <cstdlib>
#include <cstring>

#include <torch/csrc/stable/library.h>

#include "calls.h"
#include "cpu/dispatch.h"
#include "cpu/pnorm.h"
#include "cpu/softmax.h"

namespace densreg::cpu {

static Isa detect() {
  Isa best = Isa::scalar;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* wanted = std::getenv("DENSREG_CPU_CAPABILITY");
  if (!wanted) return best;
  const Isa named = !std::strcmp(wanted, "scalar") ? Isa::scalar : !std::strcmp(wanted, "avx2") ? Isa::avx2 : best;
  return named < best ? named : best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

}  // namespace densreg::cpu

// For densreg/ops.py, through ctypes: the instruction set in use (0 scalar, 1 AVX2, 2 AVX-512), and how often the
// operator of that index (enum Op) was served by which kernels (enum Kernel).
extern "C" __attribute__((visibility("default"))) int densreg_isa() { return static_cast<int>(densreg::cpu::isa()); }
extern "C" __attribute__((visibility("default"))) int64_t densreg_calls(int op, int kernel) {
  return densreg::calls[op][kernel].load();
}

STABLE_TORCH_LIBRARY_IMPL(densreg, CPU, m) {
  m.impl("softmax", TORCH_BOX(&densreg::cpu::softmax));
  m.impl("softmax_backward", TORCH_BOX(&densreg::cpu::softmax_backward));
  m.impl("pnorm", TORCH_BOX(&densreg::cpu::pnorm));
  m.impl("pnorm_backward", TORCH_BOX(&densreg::cpu::pnorm_backward));
}
