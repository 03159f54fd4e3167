// pnorm and pnorm_backward on CPU. The mathematics is in densreg/ops/pnorm.py.
#include "pnorm.h"

#include "dispatch.h"

namespace densreg::cpu {
namespace {

CallCounter pnorm_calls("pnorm", std::string("cpu-") + isa_name());
CallCounter pnorm_backward_calls("pnorm_backward", std::string("cpu-") + isa_name());

constexpr int64_t kBlock = 1024;

template <class V>
DENSREG_INLINE typename V::F magnitude(typename V::F x) {
  using I = typename V::I;
  return bits<typename V::F>(bits<I>(x) & std::numeric_limits<typename V::Int>::max());
}

// r^p for r in [0, 1]: exp(p log r), with 0 for 0, and NaN for NaN.
template <class V, class T>
DENSREG_INLINE typename V::F power_unit(typename V::F r, T p) {
  using F = typename V::F;
  p = p < T(1e30) ? p : T(1e30);  // 0 * inf would be NaN
  // A subnormal r counts: for p near 1, r^(p-1) is near 1 however small r is.
  constexpr T tiny = std::numeric_limits<T>::min();
  const F normal = r < tiny ? r * T(0x1p64) : r;
  const F shift = r < tiny ? splat<F>(T(64 * 0.69314718055994530942)) : F{};
  const F y = exp_nonpositive<V>((log_unit<V>(r == 0 ? splat<F>(1) : normal) - shift) * p);
  return r == 0 ? F{} : y;
}

template <class S>
struct ForwardArgs {
  using Acc = typename S::Acc;
  const typename S::Raw* g;
  int64_t n;
  double p;
  Order order;
  Acc* norm;
  Acc* peak;
  Acc* total;
};

template <class S, int BYTES>
struct Lanes {
  using Acc = typename S::Acc;
  using V = Vector<Acc, BYTES>;
  using F = typename V::F;
  static constexpr int W = V::width;

  // W elements from i on; past the end of the row, zeros.
  static DENSREG_INLINE F at(const typename S::Raw* g, int64_t i, int64_t n) {
    if (i + W <= n) return load<S, V>(g + i);
    F f = {};
    for (int lane = 0; lane < n - i; ++lane) f[lane] = load_one<S>(g + i + lane);
    return f;
  }
};

template <class S, int BYTES>
DENSREG_INLINE double power_sum(const typename S::Raw* g, int64_t n, typename S::Acc peak, double p, Order order) {
  using L = Lanes<S, BYTES>;
  using V = typename L::V;
  using F = typename L::F;
  double total = 0;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t stop = block + kBlock < n ? block + kBlock : n;
    F s0 = {}, s1 = {};
    for (int64_t i = block; i < stop; i += 2 * L::W) {
      // Divided by the peak, not multiplied by its reciprocal: that is infinite for a subnormal peak.
      F a = magnitude<V>(L::at(g, i, n)) / peak;
      F b = i + L::W < stop ? magnitude<V>(L::at(g, i + L::W, n)) / peak : F{};
      if (order == Order::two) {
        a *= a;
        b *= b;
      } else if (order == Order::general) {
        a = power_unit<V>(a, static_cast<typename S::Acc>(p));
        b = power_unit<V>(b, static_cast<typename S::Acc>(p));
      } else if (order == Order::inf) {  // ties
        a = select(a == 1, splat<F>(1), F{});
        b = select(b == 1, splat<F>(1), F{});
      }
      s0 += a;
      s1 += b;
    }
    total += static_cast<double>(reduce_add<V>(s0 + s1));
  }
  return total;
}

struct Forward {
  template <class S, int BYTES>
  static DENSREG_INLINE void run(const ForwardArgs<S>& a, int64_t begin, int64_t end) {
    using L = Lanes<S, BYTES>;
    using V = typename L::V;
    using F = typename L::F;
    using Acc = typename S::Acc;
    for (int64_t row = begin; row < end; ++row) {
      const typename S::Raw* g = a.g + row * a.n;
      F m0 = {}, m1 = {};
      // One read for p = 2, as long as no square over- or underflows: the sum of squares beside the peak.
      double squares = 0;
      typename V::I nan = {};
      for (int64_t block = 0; block < a.n; block += kBlock) {
        const int64_t stop = block + kBlock < a.n ? block + kBlock : a.n;
        F s0 = {}, s1 = {};
        for (int64_t i = block; i < stop; i += 2 * L::W) {
          const F x = L::at(g, i, a.n);
          const F y = i + L::W < stop ? L::at(g, i + L::W, a.n) : F{};
          nan |= (x != x) | (y != y);
          m0 = max(magnitude<V>(x), m0);
          m1 = max(magnitude<V>(y), m1);
          if (a.order == Order::two) {
            s0 += x * x;
            s1 += y * y;
          }
        }
        if (a.order == Order::two) squares += static_cast<double>(reduce_add<V>(s0 + s1));
      }
      Acc peak = reduce_max<V>(max(m0, m1));
      bool any_nan = false;
      for (int lane = 0; lane < L::W; ++lane) any_nan |= nan[lane] != 0;
      if (any_nan) peak = std::numeric_limits<Acc>::quiet_NaN();
      double total = 1;
      const double wide = static_cast<double>(peak);
      if (peak > 0 && !std::isinf(peak)) {
        const bool safe = sizeof(Acc) == 4 ? wide > 1e-12 && wide < 1e12 : wide > 1e-100 && wide < 1e100;
        total = a.order == Order::two && safe ? squares / (wide * wide)
                                              : power_sum<S, BYTES>(g, a.n, peak, a.p, a.order);
      } else if (peak != peak) {
        // In a row with a NaN nothing is of the largest magnitude.
        total = a.order == Order::inf ? 1 : std::numeric_limits<double>::quiet_NaN();
      } else if (a.order == Order::inf && a.n > 0) {  // ties of 0 or inf
        total = 0;
        for (int64_t i = 0; i < a.n; ++i) total += std::abs(load_one<S>(g + i)) == peak;
      }
      a.peak[row] = peak;
      a.total[row] = static_cast<Acc>(total);
      const double root = a.order == Order::one   ? total
                          : a.order == Order::two ? std::sqrt(total)
                          : a.order == Order::inf ? 1
                                                  : std::pow(total, 1 / a.p);
      a.norm[row] = static_cast<Acc>(wide * root);
    }
  }
};

template <class S>
struct BackwardArgs {
  using Acc = typename S::Acc;
  const typename S::Raw* g;
  int64_t n;
  double p;
  Order order;
  const Acc* grad;
  const Acc* peak;
  const Acc* total;
  typename S::Raw* out;
};

struct Backward {
  template <class S, int BYTES>
  static DENSREG_INLINE void run(const BackwardArgs<S>& a, int64_t begin, int64_t end) {
    using L = Lanes<S, BYTES>;
    using V = typename L::V;
    using F = typename L::F;
    using I = typename V::I;
    using Acc = typename S::Acc;
    const I sign_bit = splat<I>(std::numeric_limits<typename V::Int>::min());
    for (int64_t row = begin; row < end; ++row) {
      const typename S::Raw* g = a.g + row * a.n;
      typename S::Raw* out = a.out + row * a.n;
      const Acc peak = a.peak[row];
      const Acc divisor = peak == 0 ? Acc(1) : peak;
      const double total = static_cast<double>(a.total[row]);
      const double share = a.order == Order::one   ? 1
                           : a.order == Order::two ? 1 / std::sqrt(total)
                           : a.order == Order::inf ? 1 / total
                                                   : std::pow(total, 1 / a.p - 1);
      const Acc grad = static_cast<Acc>(static_cast<double>(a.grad[row]) * share);
      for (int64_t i = 0; i < a.n; i += L::W) {
        const F x = L::at(g, i, a.n);
        F dual;
        I no_sign = ~((x < 0) | (x > 0));  // sign(0) = 0; and torch's sign of a NaN is 0 too
        if (a.order == Order::two) {
          dual = x / divisor;
        } else {
          const F m = magnitude<V>(x);
          if (a.order == Order::one) {
            dual = splat<F>(1);
          } else if (a.order == Order::inf) {
            dual = select(m == peak, splat<F>(1), F{});
          } else {
            const F r = m / divisor;
            const F y = power_unit<V>(r, static_cast<Acc>(a.p - 1));
            dual = select(r == r, y, r);
            no_sign = (x == 0) & (r == r);  // but here a NaN stays
          }
          dual = bits<F>(bits<I>(dual) | (bits<I>(x) & sign_bit));
          dual = select(no_sign, F{}, dual);
        }
        dual *= grad;
        if (i + L::W <= a.n) {
          store<S, V>(dual, out + i);
        } else {
          for (int lane = 0; lane < a.n - i; ++lane) store_one<S>(dual[lane], out + i + lane);
        }
      }
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> pnorm(Tensor g, double p) {
  STD_TORCH_CHECK(g.dim() >= 2 && g.is_cpu(), "densreg::pnorm: g must be a CPU tensor of shape [rows, ...]");
  pnorm_calls.add();
  if (!dense_rows(g)) g = torch::stable::contiguous(g);
  const int64_t rows = g.size(0), n = rows ? g.numel() / rows : 0;
  const auto row = row_dtype(g.scalar_type());
  Tensor norm = empty<1>({rows}, row);
  Tensor peak = empty<1>({rows}, row);
  Tensor total = empty<1>({rows}, row);
  for_dtype(g.scalar_type(), "pnorm", [&](auto storage) {
    using S = decltype(storage);
    using Acc = typename S::Acc;
    const ForwardArgs<S> args{static_cast<const typename S::Raw*>(g.data_ptr()),
                              n,
                              p,
                              order_of(p),
                              static_cast<Acc*>(norm.data_ptr()),
                              static_cast<Acc*>(peak.data_ptr()),
                              static_cast<Acc*>(total.data_ptr())};
    parallel_rows<Forward, S>(args, rows, n);
  });
  return {norm, peak, total};
}

Tensor pnorm_backward(Tensor grad, Tensor g, Tensor peak, Tensor total, double p) {
  STD_TORCH_CHECK(g.dim() >= 2 && g.is_cpu(), "densreg::pnorm_backward: g must be a CPU tensor of shape [rows, ...]");
  for (const Tensor& t : {grad, peak, total}) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == g.size(0) && t.is_cpu(),
                    "densreg::pnorm_backward: grad, peak and total must be CPU tensors of shape [", g.size(0), "]");
  }
  pnorm_backward_calls.add();
  Tensor out = torch::stable::empty_like(g);  // g's memory format
  const bool direct = dense_rows(g);
  if (!direct) g = torch::stable::contiguous(g);
  Tensor dense = direct ? out : torch::stable::empty_like(g);
  const int64_t rows = g.size(0), n = rows ? g.numel() / rows : 0;
  const auto row = row_dtype(g.scalar_type());
  auto as_row = [&](Tensor t) {
    if (t.scalar_type() != row) t = torch::stable::to(t, row);
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  };
  grad = as_row(grad);
  peak = as_row(peak);
  total = as_row(total);
  for_dtype(g.scalar_type(), "pnorm_backward", [&](auto storage) {
    using S = decltype(storage);
    using Acc = typename S::Acc;
    const BackwardArgs<S> args{static_cast<const typename S::Raw*>(g.data_ptr()),
                               n,
                               p,
                               order_of(p),
                               static_cast<const Acc*>(grad.data_ptr()),
                               static_cast<const Acc*>(peak.data_ptr()),
                               static_cast<const Acc*>(total.data_ptr()),
                               static_cast<typename S::Raw*>(dense.data_ptr())};
    parallel_rows<Backward, S>(args, rows, n);
  });
  if (!direct) torch::stable::copy_(out, dense);
  return out;
}

}  // namespace densreg::cpu
