// pnorm and pnorm_backward on CUDA. The mathematics is in densreg/ops/pnorm.py.
//
// A row that fits in one tile is read by one group of threads (pnorm_rows). A longer one is split into chunks: of each
// peak and total are left, and then put together for each row, by the same launch (fronts.h).
#include "fronts.h"
#include "pnorm.h"

namespace densreg::cuda {
namespace {

CallCounter pnorm_calls("pnorm", "cuda");
CallCounter pnorm_backward_calls("pnorm_backward", "cuda");

// Magnitudes are compared as integers: in that order infinity comes after every number, and a NaN after infinity.
DENSREG_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x) & 0x7fffffffu; }
DENSREG_DEVICE uint64_t bits_of(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}
DENSREG_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
DENSREG_DEVICE double from_bits(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

// The power of two that brings a magnitude near one (a subnormal one as near as it goes): exact, where a quotient or
// the reciprocal of a subnormal number is not.
DENSREG_DEVICE float power_of_two_for(float peak) {
  const uint32_t exponent = bits_of(peak) >> 23;
  return from_bits((254u - (exponent < 1 ? 1u : exponent > 253 ? 253u : exponent)) << 23);
}
DENSREG_DEVICE double power_of_two_for(double peak) {
  const uint64_t exponent = bits_of(peak) >> 52;
  return from_bits((2046 - (exponent < 1 ? uint64_t{1} : exponent > 2045 ? uint64_t{2045} : exponent)) << 52);
}

// A row's peak, and how its elements are measured against it. The order of the norm is a template's parameter: asked at
// run time it was a branch for each element, with powf in one of them, and more registers.
template <class A>
struct Peak {
  A value;
  A divisor;         // the peak, or one for a row of zeros
  A scale, inverse;  // x scale inverse = x / divisor, without overflow

  DENSREG_DEVICE explicit Peak(A peak) : value(peak), divisor(peak == 0 ? A(1) : peak) {
    scale = power_of_two_for(divisor);
    inverse = 1 / (divisor * scale);
  }

  // What an element adds to the total; then to be multiplied by unit().
  template <Order order>
  DENSREG_DEVICE A term(A x, A p) const {
    const A y = x * scale;
    return order == Order::two   ? y * y
           : order == Order::one ? magnitude(y)
           : order == Order::inf ? A(magnitude(x) == value)
                                 : power(magnitude(x) / divisor, p);
  }
  template <Order order>
  DENSREG_DEVICE A unit() const {
    return order == Order::two ? inverse * inverse : order == Order::one ? inverse : A(1);
  }
  // What the total of a part with another peak counts in this one.
  template <Order order>
  DENSREG_DEVICE A weight(A other, A p) const {
    if (order == Order::inf) return A(other == value);
    const A r = other * scale * inverse;
    return order == Order::two ? r * r : order == Order::one ? r : power(other / divisor, p);
  }
};

// The total of a row of n elements: as it was summed, but where that means nothing.
template <Order order, class A>
DENSREG_DEVICE A total_of(A peak, A sum, int64_t n) {
  if (order == Order::inf) return peak == 0 ? static_cast<A>(n > 1 ? n : 1) : sum > 1 ? sum : A(1);
  return peak == 0 || peak == kInfinity<A> ? A(1) : peak != peak ? peak : sum;
}

template <Order order, class A>
DENSREG_DEVICE A norm_of(A peak, A total, A p) {
  return order == Order::inf ? peak
                             : peak * (order == Order::one   ? total
                                       : order == Order::two ? root(total)
                                                             : power(total, 1 / p));
}

// The gradient of a row's norm: sign(g) (|g| / peak)^(p-1) total^(1/p - 1), times the gradient that arrives.
template <Order order, class A>
struct Dual {
  Peak<A> peak;
  A factor;
  A p_less_one;

  // p - 1 and 1/p - 1 come from the host, where p is a double: near p = 1 float32 would round them away.
  DENSREG_DEVICE Dual(Peak<A> of, A total, A grad, A p_less_one, A exponent) : peak(of), p_less_one(p_less_one) {
    factor = grad * (order == Order::one   ? A(1)
                     : order == Order::two ? 1 / root(total)
                     : order == Order::inf ? 1 / total
                                           : power(total, exponent));
  }

  DENSREG_DEVICE A operator()(A x) const {
    if (order == Order::two) return x * peak.scale * peak.inverse * factor;
    A y = 1;
    if (order == Order::inf) y = A(magnitude(x) == peak.value);
    if (order == Order::general) {
      y = power(magnitude(x) / peak.divisor, p_less_one);
      if (y != y) return y;  // here a NaN stays; in the sign it is 0, as torch's is
    }
    return (x > 0 ? y : x < 0 ? -y : A(0)) * factor;
  }
};

template <class Raw>
struct NormArgs {
  using A = Acc<Raw>;
  const Raw* g;
  int64_t rows;
  int64_t n;
  A p;
  A* norm;
  A* peak;
  A* total;
  Fronts<A> fronts;  // of each chunk peak and total
};

template <Order order, class Raw>
DENSREG_DEVICE void finish_row(const NormArgs<Raw>& a, int64_t row, Acc<Raw> peak, Acc<Raw> total) {
  a.norm[row] = norm_of<order>(peak, total, a.p);
  a.peak[row] = peak;
  a.total[row] = total;
}

// The 1: left to itself, the assembler gives float64 so few registers here that they spill.
template <Order order, class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads, 1) pnorm_rows(NormArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int64_t row = Group<T>::row();
  const bool there = row < a.rows;
  const int lane = Group<T>::lane();
  const Raw* g = a.g + (there ? row * a.n : 0);
  const Cut cut{there ? static_cast<int>(a.n) : 0, Cut::shift_of(g)};
  A x[V][N];
  auto bits = bits_of(A(0));
#pragma unroll
  for (int j = 0; j < V; ++j) {
    cut.load(g, lane + j * T, A(0), x[j]);
#pragma unroll
    for (int e = 0; e < N; ++e) bits = Max{}(bits, bits_of(x[j][e]));
  }
  const Peak<A> peak(from_bits(group_reduce<T>(bits, Max{})));
  A total = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
#pragma unroll
    for (int e = 0; e < N; ++e) total += peak.template term<order>(x[j][e], a.p);
  }
  total = total_of<order>(peak.value, group_reduce<T>(total, Sum{}) * peak.template unit<order>(), a.n);
  if (there && lane == 0) finish_row<order>(a, row, peak.value, total);
}

// Leaves peak and total of a chunk.
template <Order order, class Raw, int T, int V>
DENSREG_DEVICE void reduce_chunk(const NormArgs<Raw>& a, const Item& item) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int lane = Group<T>::lane();
  const Raw* g = a.g + item.row * a.n + a.fronts.split.begin(item.chunk);
  const Cut cut{a.fronts.split.length(item.chunk, a.n), Cut::shift_of(g)};
  auto bits = bits_of(A(0));
  A total = 0;
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V) {
    A x[V][N];
    auto larger = bits;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      cut.load(g, tile + lane + j * T, A(0), x[j]);
#pragma unroll
      for (int e = 0; e < N; ++e) larger = Max{}(larger, bits_of(x[j][e]));
    }
    larger = group_reduce<T>(larger, Max{});
    const Peak<A> peak(from_bits(larger));
    if (total != 0) total *= peak.template weight<order>(from_bits(bits), a.p);
    bits = larger;
    A of_tile = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) of_tile += peak.template term<order>(x[j][e], a.p);
    }
    total += of_tile * peak.template unit<order>();
  }
  total = group_reduce<T>(total, Sum{});
  if (lane == 0) {
    a.fronts.publish(item, 0, from_bits(bits));
    a.fronts.publish(item, 1, total);
  }
}

// A row's peak and total from those of its chunks.
template <Order order, class Raw, int T>
DENSREG_DEVICE void combine_chunks(const NormArgs<Raw>& a, int64_t row) {
  using A = Acc<Raw>;
  const int lane = Group<T>::lane();
  A of_chunk[kWaits<T>][2];
  auto bits = bits_of(A(0));
#pragma unroll
  for (int k = 0; k < kWaits<T>; ++k) {
    if (lane + k * T >= a.fronts.split.chunks) continue;
    a.fronts.wait(row, lane + k * T, 2, of_chunk[k]);
    bits = Max{}(bits, bits_of(of_chunk[k][0]));
  }
  const Peak<A> peak(from_bits(group_reduce<T>(bits, Max{})));
  A total = 0;
#pragma unroll
  for (int k = 0; k < kWaits<T>; ++k) {
    if (lane + k * T >= a.fronts.split.chunks) continue;
    total += of_chunk[k][1] * peak.template weight<order>(of_chunk[k][0], a.p);
  }
  total = total_of<order>(peak.value, group_reduce<T>(total, Sum{}), a.n);
  if (lane == 0) finish_row<order>(a, row, peak.value, total);
}

template <Order order, class Raw, int T, int V>
__global__ void __launch_bounds__(T, kResident<Raw>) pnorm_fronts(NormArgs<Raw> a) {
  const Item item = a.fronts.take();
  if (item.writes) {
    combine_chunks<order, Raw, T>(a, item.row);
  } else {
    reduce_chunk<order, Raw, T, V>(a, item);
  }
}

template <class Raw>
struct BackwardArgs {
  using A = Acc<Raw>;
  const Raw* g;
  int64_t rows;
  int64_t n;
  A p_less_one, exponent;
  const A* grad;
  const A* peak;
  const A* total;
  Raw* out;
  Split split;
};

// One thread group for each chunk: a row that fits in one tile is a chunk.
template <Order order, class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads) pnorm_backward_chunks(BackwardArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int64_t row = Group<T>::row(), chunk = blockIdx.y;
  if (row >= a.rows) return;  // nothing is shared here
  const int lane = Group<T>::lane();
  const Dual<order, A> dual(Peak<A>(a.peak[row]), a.total[row], a.grad[row], a.p_less_one, a.exponent);
  const Raw* g = a.g + row * a.n + a.split.begin(chunk);
  Raw* out = a.out + row * a.n + a.split.begin(chunk);
  const Cut cut{a.split.length(chunk, a.n), Cut::shift_of(g)};
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V) {
    A x[V][N];
#pragma unroll
    for (int j = 0; j < V; ++j) cut.load(g, tile + lane + j * T, A(0), x[j]);
#pragma unroll
    for (int j = 0; j < V; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) x[j][e] = dual(x[j][e]);
      cut.store(out, tile + lane + j * T, x[j]);
    }
  }
}

// Calls f with the order of a norm, as a compile-time constant.
template <class F>
void for_order(double p, F f) {
  switch (order_of(p)) {
    case Order::one: return f(std::integral_constant<Order, Order::one>{});
    case Order::two: return f(std::integral_constant<Order, Order::two>{});
    case Order::inf: return f(std::integral_constant<Order, Order::inf>{});
    default: return f(std::integral_constant<Order, Order::general>{});
  }
}

void check(const char* op, const Tensor& g) {
  STD_TORCH_CHECK(g.dim() >= 2, "densreg::", op, ": g must be a tensor of shape [rows, ...]");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> pnorm(Tensor g, double p) {
  check("pnorm", g);
  pnorm_calls.add();
  const OnDevice device(g);
  if (!dense_rows(g)) g = torch::stable::contiguous(g);
  const int64_t rows = g.size(0), n = rows ? g.numel() / rows : 0;
  const auto row = row_dtype(g.scalar_type());
  const Tensor norm = empty<1>(g, {rows}, row), peak = empty<1>(g, {rows}, row), total = empty<1>(g, {rows}, row);
  for_dtype(g.scalar_type(), "pnorm", [&](auto zero) {
    using Raw = decltype(zero);
    using A = Acc<Raw>;
    NormArgs<Raw> args{data<const Raw>(g),
                       rows,
                       n,
                       static_cast<A>(p),
                       data<A>(norm),
                       data<A>(peak),
                       data<A>(total),
                       {}};
    for_order(p, [&](auto order) {
      // Powers take registers: 1024 threads have too few for 16 of them, on sm_100.
      constexpr size_t configs = std::size(kTileConfigs) - (order == Order::general);
      const bool held = with_tile_config<Raw, 1, configs>(n, is_aligned(args.g, n), [&](auto threads, auto vectors) {
        device.launch<threads>(pnorm_rows<order, Raw, threads, vectors>, rows, args);
      });
      if (held) return;
      constexpr int T = kSplit.threads, V = vectors_of<Raw, 1>(kSplit);
      launch_fronts<T, Raw, 1>(device, pnorm_fronts<order, Raw, T, V>, g, rows, n, 2, true, args);
    });
  });
  return {norm, peak, total};
}

Tensor pnorm_backward(Tensor grad, Tensor g, Tensor peak, Tensor total, double p) {
  const char* op = "pnorm_backward";
  check(op, g);
  check_rows(op, "grad", grad, g);
  check_rows(op, "peak", peak, g);
  check_rows(op, "total", total, g);
  pnorm_backward_calls.add();
  const OnDevice device(g);
  Tensor out = torch::stable::empty_like(g);  // g's memory format
  const bool direct = dense_rows(g);
  if (!direct) g = torch::stable::contiguous(g);
  const Tensor dense = direct ? out : torch::stable::empty_like(g);
  const int64_t rows = g.size(0), n = rows ? g.numel() / rows : 0;
  const auto row = row_dtype(g.scalar_type());
  const auto grads = contiguous_as(grad, row), peaks = contiguous_as(peak, row), totals = contiguous_as(total, row);
  for_dtype(g.scalar_type(), op, [&](auto zero) {
    using Raw = decltype(zero);
    using A = Acc<Raw>;
    BackwardArgs<Raw> args{data<const Raw>(g),
                           rows,
                           n,
                           static_cast<A>(p - 1),
                           static_cast<A>(1 / p - 1),
                           data_or_null<A>(grads),
                           data_or_null<A>(peaks),
                           data_or_null<A>(totals),
                           data<Raw>(dense),
                           {1, n}};
    for_order(p, [&](auto order) {
      const bool held = with_tile_config<Raw, 1>(n, is_aligned(args.g, n), [&](auto threads, auto vectors) {
        device.launch<threads>(pnorm_backward_chunks<order, Raw, threads, vectors>, rows, args);
      });
      if (held) return;
      constexpr int T = kSplit.threads, V = vectors_of<Raw, 2>(kSplit);
      args.split = split_of<Raw, 1>(n);
      device.launch<T>(pnorm_backward_chunks<order, Raw, T, V>, rows, args, args.split.chunks);
    });
  });
  if (!direct) torch::stable::copy_(out, dense);
  return out;
}

}  // namespace densreg::cuda
