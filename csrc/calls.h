// How often each operator was served by which kernels: for tests and benchmarks, through densreg_calls in register.cpp.
#pragma once

#include <atomic>
#include <cstdint>

namespace densreg {

// In the order of OPERATORS and _KERNELS in densreg/ops.py; the first three kernels are the values of cpu::Isa.
enum class Op { softmax, softmax_backward, pnorm, pnorm_backward, count };
enum class Kernel { cpu_scalar, cpu_avx2, cpu_avx512, cuda, count };

inline std::atomic<int64_t> calls[static_cast<int>(Op::count)][static_cast<int>(Kernel::count)];

inline void count_call(Op op, Kernel kernel) {
  calls[static_cast<int>(op)][static_cast<int>(kernel)].fetch_add(1, std::memory_order_relaxed);
}

}  // namespace densreg
