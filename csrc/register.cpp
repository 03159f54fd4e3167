// Which operators the CPU kernels implement. The schemas are in densreg/ops/.
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
  const char* asked = std::getenv("DENSREG_CPU_CAPABILITY");
  if (!asked) return best;
  const Isa named = !std::strcmp(asked, "scalar") ? Isa::scalar : !std::strcmp(asked, "avx2") ? Isa::avx2 : best;
  return named < best ? named : best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "scalar"; }

}  // namespace densreg::cpu

// For densreg/ops/extension.py, through ctypes: the instruction set in use, and the counters of calls.
extern "C" __attribute__((visibility("default"))) const char* densreg_instruction_set() {
  return densreg::cpu::isa_name();
}
extern "C" __attribute__((visibility("default"))) const char* densreg_counter(int index, int64_t* calls) {
  return densreg::CallCounter::read(index, calls);
}

STABLE_TORCH_LIBRARY_IMPL(densreg, CPU, m) {
  m.impl("softmax", TORCH_BOX(&densreg::cpu::softmax));
  m.impl("softmax_backward", TORCH_BOX(&densreg::cpu::softmax_backward));
  m.impl("softmax_double_backward", TORCH_BOX(&densreg::cpu::softmax_double_backward));
  m.impl("pnorm", TORCH_BOX(&densreg::cpu::pnorm));
  m.impl("pnorm_backward", TORCH_BOX(&densreg::cpu::pnorm_backward));
}
