// From an operator's arguments to a kernel body: instruction set, storage type, threads.
#pragma once

#include <algorithm>
#include <array>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../arguments.h"
#include "../calls.h"
#include "simd.h"

namespace densreg::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A body is a struct with `template <class S, int BYTES> static DENSREG_INLINE void run(const Args&, begin, end)`.
template <class Body, class S, class Args>
void run_scalar(const Args& args, int64_t begin, int64_t end) {
  Body::template run<S, 16>(args, begin, end);
}
#if defined(__x86_64__)
template <class Body, class S, class Args>
DENSREG_AVX2 void run_avx2(const Args& args, int64_t begin, int64_t end) {
  Body::template run<S, 32>(args, begin, end);
}
template <class Body, class S, class Args>
DENSREG_AVX512 void run_avx512(const Args& args, int64_t begin, int64_t end) {
  Body::template run<S, 64>(args, begin, end);
}
#endif

// Work per thread below which another thread costs more than it brings.
constexpr int64_t kGrain = 32768;

// Runs the body over [0, rows), each row of `cost` elements, on torch's threads; chunks are multiples of `align` rows.
template <class Body, class S, class Args>
void parallel_rows(const Args& args, int64_t rows, int64_t cost, int64_t align = 1) {
  void (*kernel)(const Args&, int64_t, int64_t) = run_scalar<Body, S, Args>;
#if defined(__x86_64__)
  if (isa() == Isa::avx512) kernel = run_avx512<Body, S, Args>;
  if (isa() == Isa::avx2) kernel = run_avx2<Body, S, Args>;
#endif
  const int64_t units = (rows + align - 1) / align;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cost * align));
  if (units <= grain) {
    kernel(args, 0, rows);
    return;
  }
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    kernel(args, begin * align, std::min(end * align, rows));
  });
}

// Calls f(S{}) with the storage type of a dtype.
template <class F>
void for_dtype(ScalarType dtype, const char* op, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(F32{});
    case ScalarType::Double: return f(F64{});
    case ScalarType::BFloat16: return f(BF16{});
    case ScalarType::Half: return f(F16{});
    default: STD_TORCH_CHECK(false, "densreg::", op, ": expected float16, bfloat16, float32 or float64");
  }
}

// A fresh contiguous tensor on the CPU, by the shortest way: small calls are made of these.
template <size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, ScalarType dtype) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  const int32_t type = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Double   ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(N), sizes.data(), strides.data(), type,
                                                  aoti_torch_device_type_cpu(), -1, &handle));
  Tensor tensor(handle);
#if defined(__linux__)
  // A large output is fresh memory: most of its time would go into page faults of 4 KiB.
  constexpr int64_t huge = 2 << 20;
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes >= 4 * huge) {
    const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + huge - 1) / huge * huge;
    const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + bytes) / huge * huge;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail
  }
#endif
  return tensor;
}

}  // namespace densreg::cpu
