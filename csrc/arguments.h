// What kernels on every device ask of an operator's arguments: layouts, dtypes, the order of a norm.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace densreg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Order { one, two, general, inf };

inline Order order_of(double p) {
  return p == 1 ? Order::one : p == 2 ? Order::two : std::isinf(p) ? Order::inf : Order::general;
}

inline ScalarType row_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor rows_contiguous(const Tensor& t) {  // each row dense; rows may repeat or be apart
  return t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return t->is_contiguous() ? *t : torch::stable::contiguous(*t);
}

inline std::optional<Tensor> contiguous_as(const std::optional<Tensor>& t, ScalarType dtype) {
  if (!t) return std::nullopt;
  return contiguous(t->scalar_type() == dtype ? *t : torch::stable::to(*t, dtype));
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Whether every row g[b] is one dense block of memory, in whatever order of dimensions, and the rows follow each other.
inline bool dense_rows(const Tensor& g) {
  if (g.numel() == 0 || g.is_contiguous()) return true;
  const int64_t d = g.dim();
  int64_t expected = 1;
  bool used[64] = {};
  for (int64_t found = 1; found < d;) {  // by increasing stride
    bool advanced = false;
    for (int64_t i = 1; i < d; ++i) {
      if (used[i]) continue;
      if (g.size(i) == 1 || g.stride(i) == expected) {
        used[i] = advanced = true;
        expected *= g.size(i);
        ++found;
      }
    }
    if (!advanced) return false;
  }
  return g.size(0) == 1 || g.stride(0) == expected;
}

}  // namespace densreg
