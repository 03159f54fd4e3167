// softmax, softmax_backward and softmax_double_backward on CUDA. The mathematics is in densreg/ops/softmax.py.
//
// A row that fits in one tile is read once (softmax_rows, softmax_backward_rows). A longer one is split into chunks: of
// each the sums are left, and then it is written with those of its whole row, by the same launch (fronts.h).
#include "fronts.h"
#include "softmax.h"

namespace densreg::cuda {
namespace {

CallCounter softmax_calls("softmax", "cuda");
CallCounter softmax_backward_calls("softmax_backward", "cuda");
CallCounter softmax_double_backward_calls("softmax_double_backward", "cuda");

// 2^x, to 2^-22; below the smallest normal number 0.
DENSREG_DEVICE float exp2_approximately(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else  // the tests' emulation
  return exp2f(x);
#endif
}

// exp(f - m) for f <= m, also for m infinite as base() has it.
//
// For a sum. What is rounded off costs |f - m| times 1e-7 at most; in the sum this counts with the element's share,
// which is small far below the maximum.
DENSREG_DEVICE float exp_to_sum(float f, float m) { return exp2_approximately((f - m) * 1.44269504f); }
DENSREG_DEVICE double exp_to_sum(double f, double m) { return exp(f - m); }

// For P itself, with what was rounded off put back: at f - m = -80 the difference alone would cost 4e-6 in float32. Not
// where that is a NaN, at infinities, nor where the exponential is infinite, above a base of 0.
DENSREG_DEVICE float exp_to_write(float f, float m) {
  constexpr float log2_e = 1.44269504f, log2_e_low = 1.925963033500e-08f;  // what float32 rounds off log2 e
  const float x = f - m;
  const float b = x - f;
  const float h = x * log2_e;
  const float y = exp2_approximately(h);
  const float low = fmaf(x, log2_e_low, fmaf(x, log2_e, -h));  // log2 e x = h + low
  const float rest = fmaf(low, 0.693147181f, (f - (x - b)) - (m + b));
  return fabsf(rest) < 1 && y < kInfinity<float> ? fmaf(y, rest, y) : y;
}
DENSREG_DEVICE double exp_to_write(double f, double m) {
  const double x = f - m;
  const double y = exp(x);
  const double b = x - f;
  const double rest = (f - (x - b)) - (m + b);
  return fabs(rest) < 1 && y < kInfinity<double> ? fma(y, rest, y) : y;
}

// Half precision rounds P far more than the cheaper one.
template <class Raw>
DENSREG_DEVICE Acc<Raw> exp_for(Acc<Raw> f, Acc<Raw> m) {
  if constexpr (sizeof(Raw) == 2) return exp_to_sum(f, m);
  return exp_to_write(f, m);
}

// What is subtracted from the logits of a row: its maximum. Zero where that is infinite, so that nothing but -inf sums
// to 0 and +inf to +inf, and a NaN in the sum is a NaN among the logits.
template <class A>
DENSREG_DEVICE A base(A m) {
  return magnitude(m) == kInfinity<A> ? A(0) : m;
}

// What a sum over exp(f - from) becomes as one over exp(f - to), for from <= to.
template <class A>
DENSREG_DEVICE A rescale(A from, A to) {
  return from == to ? A(1) : exponential(from - to);
}

template <class Raw>
struct ForwardArgs {
  using A = Acc<Raw>;
  const Raw* logits;
  int64_t stride;  // between rows, in elements
  int64_t rows;
  int64_t classes;
  const int64_t* target;  // or null
  int64_t ignore_index;
  A label_smoothing;
  A scale;
  A* log_density;
  A* cross_entropy;  // null without a target
  Raw* softmax;      // or null
  A* statistics;     // [2, rows]: m, then s
  Fronts<A> fronts;  // of each chunk m, s, and for label smoothing sum_i (base(m) - f_i)
};

// The outputs of one number for a row, by one thread. `shortfall` is sum_i (base(m) - f_i).
template <class Raw>
DENSREG_DEVICE void finish_row(const ForwardArgs<Raw>& a, int64_t row, Acc<Raw> m, Acc<Raw> s, Acc<Raw> shortfall) {
  using A = Acc<Raw>;
  // An infinite maximum is the log density, as in torch.logsumexp; unless there is a NaN beside it.
  const bool infinite = magnitude(m) == kInfinity<A>;
  const A log_s = infinite ? std::numeric_limits<A>::quiet_NaN() : logarithm(s);
  a.log_density[row] = infinite && s == s ? m : m + log_s;
  a.statistics[row] = m;
  a.statistics[a.rows + row] = infinite ? std::numeric_limits<A>::quiet_NaN() : s;
  if (!a.target) return;
  const int64_t y = a.target[row];
  const bool ignored = y == a.ignore_index;
  CUDA_KERNEL_ASSERT((ignored || (y >= 0 && y < a.classes)) && "a target is out of range");
  if (ignored) {
    a.cross_entropy[row] = 0;
    return;
  }
  // Not L - f_y: at logits of 1e4 the rounding of L would be all that is left.
  A ce = (m - static_cast<A>(a.logits[row * a.stride + y])) + log_s;
  if (a.label_smoothing > 0) {
    ce = (1 - a.label_smoothing) * ce + a.label_smoothing * (shortfall / static_cast<A>(a.classes) + log_s);
  }
  a.cross_entropy[row] = ce;
}

// sum_i (b - f_i) over the elements of a vector.
template <class Raw>
DENSREG_DEVICE Acc<Raw> shortfall_of(const Cut& cut, int k, const Acc<Raw> (&f)[kLanes<Raw>], Acc<Raw> b) {
  Acc<Raw> total = 0;
#pragma unroll
  for (int e = 0; e < kLanes<Raw>; ++e) {
    if (cut.holds(cut.first<Raw>(k) + e)) total += b - f[e];
  }
  return total;
}

template <class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads) softmax_rows(ForwardArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int64_t row = Group<T>::row();
  const bool there = row < a.rows;
  const int lane = Group<T>::lane();
  const Raw* f = a.logits + (there ? row * a.stride : 0);
  const Cut cut{there ? static_cast<int>(a.classes) : 0, Cut::shift_of(f)};
  A x[V][N];
  A m = -kInfinity<A>;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    cut.load(f, lane + j * T, -kInfinity<A>, x[j]);
#pragma unroll
    for (int e = 0; e < N; ++e) m = Max{}(m, x[j][e]);
  }
  m = group_reduce<T>(m, Max{});
  const A b = base(m);
  A s = 0, shortfall = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (a.label_smoothing > 0) shortfall += shortfall_of<Raw>(cut, lane + j * T, x[j], b);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      x[j][e] = exp_for<Raw>(x[j][e], b);
      s += x[j][e];
    }
  }
  s = group_reduce<T>(s, Sum{});
  if (a.label_smoothing > 0) shortfall = group_reduce<T>(shortfall, Sum{});
  if (there && lane == 0) finish_row(a, row, m, s, shortfall);
  if (!there || !a.softmax) return;
  const A inverse = magnitude(m) == kInfinity<A> ? std::numeric_limits<A>::quiet_NaN() : a.scale / s;
  Raw* y = a.softmax + row * a.classes;
#pragma unroll
  for (int j = 0; j < V; ++j) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[j][e] *= inverse;
    cut.store(y, lane + j * T, x[j]);
  }
}

// Leaves the sums of a chunk.
template <class Raw, int T, int V>
DENSREG_DEVICE void reduce_chunk(const ForwardArgs<Raw>& a, const Item& item) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int lane = Group<T>::lane();
  const Raw* f = a.logits + item.row * a.stride + a.fronts.split.begin(item.chunk);
  const Cut cut{a.fronts.split.length(item.chunk, a.classes), Cut::shift_of(f)};
  A m = -kInfinity<A>, s = 0, shortfall = 0;
  int count = 0;
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V) {
    A x[V][N];
    A larger = m;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      cut.load(f, tile + lane + j * T, -kInfinity<A>, x[j]);
#pragma unroll
      for (int e = 0; e < N; ++e) larger = Max{}(larger, x[j][e]);
    }
    larger = group_reduce<T>(larger, Max{});
    const A b = base(larger);
    s *= rescale(m, larger);
    shortfall += static_cast<A>(count) * (b - base(m));
    m = larger;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (a.label_smoothing > 0) {
        shortfall += shortfall_of<Raw>(cut, tile + lane + j * T, x[j], b);
#pragma unroll
        for (int e = 0; e < N; ++e) count += cut.holds(cut.first<Raw>(tile + lane + j * T) + e);
      }
#pragma unroll
      for (int e = 0; e < N; ++e) s += exp_to_sum(x[j][e], b);
    }
  }
  s = group_reduce<T>(s, Sum{});
  if (a.label_smoothing > 0) shortfall = group_reduce<T>(shortfall, Sum{});
  if (lane == 0) {
    a.fronts.publish(item, 0, m);
    a.fronts.publish(item, 1, s);
    if (a.label_smoothing > 0) a.fronts.publish(item, 2, shortfall);
  }
}

// A row's sums from those of its chunks, and the softmax of one chunk; without a softmax a row has one block.
template <class Raw, int T, int V>
DENSREG_DEVICE void write_chunk(const ForwardArgs<Raw>& a, const Item& item) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const Split& split = a.fronts.split;
  const int lane = Group<T>::lane();
  const Raw* f = a.logits + item.row * a.stride + split.begin(item.chunk);
  const Cut cut{a.softmax ? split.length(item.chunk, a.classes) : 0, Cut::shift_of(f)};
  A x[V][N];
  const auto load = [&](int tile) {  // past the end nothing is read
#pragma unroll
    for (int j = 0; j < V; ++j) cut.template load<Use::last>(f, tile + lane + j * T, -kInfinity<A>, x[j]);
  };
  load(0);  // under way while the block waits
  A of_chunk[kWaits<T>][3];
  A m = -kInfinity<A>, s = 0, shortfall = 0;
#pragma unroll
  for (int k = 0; k < kWaits<T>; ++k) {
    const int c = lane + k * T;
    if (c >= split.chunks) continue;
    a.fronts.wait(item.row, c, a.label_smoothing > 0 ? 3 : 2, of_chunk[k]);
    m = Max{}(m, of_chunk[k][0]);
  }
  m = group_reduce<T>(m, Max{});
  const A b = base(m);
#pragma unroll
  for (int k = 0; k < kWaits<T>; ++k) {
    const int c = lane + k * T;
    if (c >= split.chunks) continue;
    s += of_chunk[k][1] * rescale(of_chunk[k][0], m);
    if (a.label_smoothing > 0) {
      shortfall += of_chunk[k][2] + static_cast<A>(split.length(c, a.classes)) * (b - base(of_chunk[k][0]));
    }
  }
  s = group_reduce<T>(s, Sum{});
  if (a.label_smoothing > 0) shortfall = group_reduce<T>(shortfall, Sum{});
  if (lane == 0 && item.chunk == 0) finish_row(a, item.row, m, s, shortfall);
  const A inverse = magnitude(m) == kInfinity<A> ? std::numeric_limits<A>::quiet_NaN() : a.scale / s;
  Raw* y = a.softmax + item.row * a.classes + split.begin(item.chunk);
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V, load(tile)) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) x[j][e] = exp_for<Raw>(x[j][e], b) * inverse;
      cut.template store<Use::last>(y, tile + lane + j * T, x[j]);
    }
  }
}

// V vectors of a thread in a chunk that is reduced, W in one that is written.
template <class Raw, int T, int V, int W>
__global__ void __launch_bounds__(T, kResident<Raw>) softmax_fronts(ForwardArgs<Raw> a) {
  const Item item = a.fronts.take();
  if (item.writes) {
    write_chunk<Raw, T, W>(a, item);
  } else {
    reduce_chunk<Raw, T, V>(a, item);
  }
}

template <class Raw>
struct BackwardArgs {
  using A = Acc<Raw>;
  const Raw* source;      // the softmax, or the logits
  int64_t source_stride;  // between rows
  const A* statistics;    // null where the source is the softmax
  int64_t rows;
  int64_t classes;
  const int64_t* target;    // or null
  const A* log_density;     // upstream gradients, or null
  const A* cross_entropy;
  const Raw* upstream;      // of the softmax
  int64_t upstream_stride;  // between rows
  A label_smoothing;
  int64_t ignore_index;
  A scale;
  Raw* grad;
  A* dots;           // null; of the double backward, whose upstream is v, where <P, v> goes
  Fronts<A> fronts;  // of each chunk <Q, U>; nothing without an upstream gradient of the softmax
};

// Q of a row: P from the logits, or the softmax, scale P.
template <class Raw>
struct Source {
  using A = Acc<Raw>;
  bool logits;
  A m, inverse;

  DENSREG_DEVICE Source(const BackwardArgs<Raw>& a, int64_t row, bool there) {
    logits = a.statistics != nullptr;
    m = logits && there ? a.statistics[row] : A(0);
    inverse = logits && there ? 1 / a.statistics[a.rows + row] : A(1);
  }

  // Past the ends of the row 0.
  template <bool TO_SUM = false, Use USE = Use::again>
  DENSREG_DEVICE void load(const Raw* p, const Cut& cut, int k, A (&q)[kLanes<Raw>]) const {
    cut.template load<USE>(p, k, logits ? -kInfinity<A> : A(0), q);
    if (logits) {
#pragma unroll
      for (int e = 0; e < kLanes<Raw>; ++e) q[e] = (TO_SUM ? exp_to_sum(q[e], m) : exp_for<Raw>(q[e], m)) * inverse;
    }
  }
};

// What a row of the gradient is: Q (c U + k) - uniform, less `hit` at the target.
template <class Raw>
struct Gradient {
  using A = Acc<Raw>;
  A c, k, uniform, hit;
  int64_t y;  // -1 where there is no target

  // dot is <Q, U>.
  DENSREG_DEVICE Gradient(const BackwardArgs<Raw>& a, int64_t row, A dot) {
    y = a.cross_entropy && a.target ? a.target[row] : -1;
    const bool counts = a.cross_entropy && a.target && y != a.ignore_index;
    CUDA_KERNEL_ASSERT((!counts || (y >= 0 && y < a.classes)) && "a target is out of range");
    if (!counts) y = -1;
    const A ce = counts ? a.cross_entropy[row] : A(0);
    const A weight = (a.log_density ? a.log_density[row] : A(0)) + ce;
    // P (weight + scale U - <P, scale U>); with Y = scale P it is Y (U + (weight - <Y, U>) / scale).
    c = a.statistics ? a.scale : A(1);
    k = a.statistics ? weight - a.scale * dot : (weight - dot) / a.scale;
    uniform = ce * (a.label_smoothing / static_cast<A>(a.classes));
    hit = ce * (1 - a.label_smoothing);
    if (a.dots) {
      c = weight;
      k = -weight * dot;
      uniform = 0;
      y = -1;
    }
  }

  // q becomes the gradient; u is null without an upstream gradient. `begin` is where the chunk begins in its row.
  DENSREG_DEVICE void apply(const Cut& cut, int v, int64_t begin, A (&q)[kLanes<Raw>],
                            const A (&u)[kLanes<Raw>]) const {
    const int64_t at = y < 0 ? -1 : y - begin - cut.first<Raw>(v);
#pragma unroll
    for (int e = 0; e < kLanes<Raw>; ++e) q[e] = q[e] * (u[e] * c + k) - uniform;
    if (at >= 0 && at < kLanes<Raw>) {  // one vector of a row
#pragma unroll
      for (int e = 0; e < kLanes<Raw>; ++e) q[e] -= at == e ? hit : A(0);
    }
  }
};

template <Use USE = Use::again, class Raw>
DENSREG_DEVICE void load_upstream(const Raw* u, const Cut& cut, int k, Acc<Raw> (&x)[kLanes<Raw>]) {
  if (u) {
    cut.template load<USE>(u, k, Acc<Raw>(0), x);
  } else {
#pragma unroll
    for (int e = 0; e < kLanes<Raw>; ++e) x[e] = 0;
  }
}

// The 1 here and below: left to itself, the assembler aims at so few registers for sm_100 that some spill.
template <class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads, 1) softmax_backward_rows(BackwardArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int64_t row = Group<T>::row();
  const bool there = row < a.rows;
  const int lane = Group<T>::lane();
  const Raw* f = a.source + (there ? row * a.source_stride : 0);
  const Raw* upstream = a.upstream ? a.upstream + (there ? row * a.upstream_stride : 0) : nullptr;
  const Cut cut{there ? static_cast<int>(a.classes) : 0, Cut::shift_of(f)};
  const Source<Raw> source(a, row, there);
  A q[V][N], u[V][N];
  A dot = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    source.load(f, cut, lane + j * T, q[j]);
    load_upstream(upstream, cut, lane + j * T, u[j]);
#pragma unroll
    for (int e = 0; e < N; ++e) dot += q[j][e] * u[j][e];
  }
  if (upstream) dot = group_reduce<T>(dot, Sum{});
  if (!there) return;
  if (a.dots && lane == 0) a.dots[row] = dot;
  const Gradient<Raw> gradient(a, row, upstream ? dot : A(0));
  Raw* g = a.grad + row * a.classes;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    gradient.apply(cut, lane + j * T, 0, q[j], u[j]);
    cut.store(g, lane + j * T, q[j]);
  }
}

// Leaves <Q, U> of a chunk.
template <class Raw, int T, int V>
DENSREG_DEVICE void reduce_chunk(const BackwardArgs<Raw>& a, const Item& item) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int lane = Group<T>::lane();
  const int64_t begin = a.fronts.split.begin(item.chunk);
  const Raw* f = a.source + item.row * a.source_stride + begin;
  const Raw* upstream = a.upstream + item.row * a.upstream_stride + begin;
  const Cut cut{a.fronts.split.length(item.chunk, a.classes), Cut::shift_of(f)};
  const Source<Raw> source(a, item.row, true);
  A dot = 0;
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V) {
    A of_tile = 0;  // a running sum over a long chunk would lose digits
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A q[N], u[N];
      source.template load<true>(f, cut, tile + lane + j * T, q);
      load_upstream(upstream, cut, tile + lane + j * T, u);
#pragma unroll
      for (int e = 0; e < N; ++e) of_tile += q[e] * u[e];
    }
    dot += of_tile;
  }
  dot = group_reduce<T>(dot, Sum{});
  if (lane == 0) a.fronts.publish(item, 0, dot);
}

// The gradient in a chunk, with <Q, U> of its row from those of the row's chunks.
template <class Raw, int T, int V>
DENSREG_DEVICE void write_chunk(const BackwardArgs<Raw>& a, const Item& item) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const Split& split = a.fronts.split;
  const int lane = Group<T>::lane();
  const int64_t begin = split.begin(item.chunk);
  const Raw* f = a.source + item.row * a.source_stride + begin;
  const Raw* upstream = a.upstream ? a.upstream + item.row * a.upstream_stride + begin : nullptr;
  Raw* g = a.grad + item.row * a.classes + begin;
  const Cut cut{split.length(item.chunk, a.classes), Cut::shift_of(f)};
  const Source<Raw> source(a, item.row, true);
  A q[V][N], u[V][N];
  const auto load = [&](int tile) {  // past the end nothing is read
#pragma unroll
    for (int j = 0; j < V; ++j) {
      source.template load<false, Use::last>(f, cut, tile + lane + j * T, q[j]);
      load_upstream<Use::last>(upstream, cut, tile + lane + j * T, u[j]);
    }
  };
  load(0);  // under way while the block waits
  A dot = 0;
  if (upstream) {
    for (int64_t c = lane; c < split.chunks; c += T) {
      A of_chunk[1];
      a.fronts.wait(item.row, c, 1, of_chunk);
      dot += of_chunk[0];
    }
    dot = group_reduce<T>(dot, Sum{});
  }
  if (a.dots && lane == 0 && item.chunk == 0) a.dots[item.row] = dot;
  const Gradient<Raw> gradient(a, item.row, dot);
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V, load(tile)) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      gradient.apply(cut, tile + lane + j * T, begin, q[j], u[j]);
      cut.template store<Use::last>(g, tile + lane + j * T, q[j]);
    }
  }
}

// As above; with W = V the assembler spills.
template <class Raw, int T, int V, int W>
__global__ void __launch_bounds__(T, kResident<Raw>) softmax_backward_fronts(BackwardArgs<Raw> a) {
  const Item item = a.fronts.take();
  if (item.writes) {
    write_chunk<Raw, T, W>(a, item);
  } else {
    reduce_chunk<Raw, T, V>(a, item);
  }
}

void check_matrix(const char* op, const char* what, const Tensor& t, const Tensor& like, int64_t rows,
                  int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns) &&
                      same_device(t, like),
                  "densreg::", op, ": ", what,
                  " must be a matrix of the shape and on the device of the other arguments");
}

// What a target holds is checked on the device.
void check_target(const char* op, const std::optional<Tensor>& target, const Tensor& like) {
  check_rows(op, "target", target, like);
  STD_TORCH_CHECK(!target || target->scalar_type() == ScalarType::Long, "densreg::", op,
                  ": target must hold int64 classes");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax(Tensor logits, std::optional<Tensor> target, double label_smoothing,
                                                   int64_t ignore_index, bool need_softmax, double scale) {
  const char* op = "softmax";
  check_matrix(op, "logits", logits, logits, -1, -1);
  check_target(op, target, logits);
  softmax_calls.add();
  const OnDevice device(logits);
  logits = rows_contiguous(logits);
  target = contiguous(target);
  const int64_t rows = logits.size(0), n = logits.size(1);
  const auto dtype = logits.scalar_type(), row = row_dtype(dtype);
  Tensor log_density = empty<1>(logits, {rows}, row);
  Tensor cross_entropy = empty<1>(logits, {target ? rows : 0}, row);
  Tensor softmax = need_softmax ? empty<2>(logits, {rows, n}, dtype) : empty<1>(logits, {0}, dtype);
  Tensor statistics = empty<2>(logits, {2, rows}, row);
  for_dtype(dtype, op, [&](auto zero) {
    using Raw = decltype(zero);
    using A = Acc<Raw>;
    ForwardArgs<Raw> args{data<const Raw>(logits),
                          rows > 1 ? logits.stride(0) : n,
                          rows,
                          n,
                          data_or_null<int64_t>(target),
                          ignore_index,
                          static_cast<A>(target ? label_smoothing : 0),
                          static_cast<A>(scale),
                          data<A>(log_density),
                          target ? data<A>(cross_entropy) : nullptr,
                          need_softmax ? data<Raw>(softmax) : nullptr,
                          data<A>(statistics),
                          {}};
    const bool aligned = is_aligned(args.logits, args.stride);
    const bool held = with_tile_config<Raw, 1>(n, aligned, [&](auto threads, auto vectors) {
      device.launch<threads>(softmax_rows<Raw, threads, vectors>, rows, args);
    });
    if (held) return;
    constexpr int T = kSplit.threads, V = vectors_of<Raw, 1>(kSplit), W = vectors_of<Raw, 2>(kSplit);
    launch_fronts<T, Raw, 1>(device, softmax_fronts<Raw, T, V, W>, logits, rows, n, args.label_smoothing > 0 ? 3 : 2,
                          !need_softmax, args);
  });
  return {log_density, cross_entropy, softmax, statistics};
}

namespace {

// The backward, or with `dots` the double backward.
Tensor run_backward(const char* op, CallCounter& counter, Tensor source, const std::optional<Tensor>& statistics,
                    const std::optional<Tensor>& target, const std::optional<Tensor>& grad_log_density,
                    const std::optional<Tensor>& grad_cross_entropy, const std::optional<Tensor>& upstream,
                    double label_smoothing, int64_t ignore_index, double scale, Tensor* dots) {
  check_matrix(op, "source", source, source, -1, -1);
  const int64_t rows = source.size(0), n = source.size(1);
  const auto dtype = source.scalar_type(), row = row_dtype(dtype);
  if (statistics) check_matrix(op, "statistics", *statistics, source, 2, rows);
  check_rows(op, "grad_log_density", grad_log_density, source);
  check_rows(op, "grad_cross_entropy", grad_cross_entropy, source);
  if (upstream) {
    const char* name = dots ? "v" : "grad_softmax";
    check_matrix(op, name, *upstream, source, rows, n);
    STD_TORCH_CHECK(upstream->scalar_type() == dtype, "densreg::", op, ": ", name,
                    " must have the dtype of the source");
  }
  check_target(op, target, source);
  counter.add();
  const OnDevice device(source);
  source = rows_contiguous(source);
  Tensor grad = empty<2>(source, {rows, n}, dtype);
  if (dots) *dots = empty<1>(source, {rows}, row);
  const auto y = contiguous(target);
  const auto stats = contiguous_as(statistics, row);
  const auto l = contiguous_as(grad_log_density, row);
  const auto a = contiguous_as(grad_cross_entropy, row);
  std::optional<Tensor> u;
  if (upstream) u = rows_contiguous(*upstream);
  for_dtype(dtype, op, [&](auto zero) {
    using Raw = decltype(zero);
    using A = Acc<Raw>;
    BackwardArgs<Raw> args{data<const Raw>(source),
                           rows > 1 ? source.stride(0) : n,
                           data_or_null<A>(stats),
                           rows,
                           n,
                           data_or_null<int64_t>(y),
                           data_or_null<A>(l),
                           data_or_null<A>(a),
                           data_or_null<Raw>(u),
                           u && rows > 1 ? u->stride(0) : n,
                           static_cast<A>(label_smoothing),
                           ignore_index,
                           static_cast<A>(scale),
                           data<Raw>(grad),
                           dots ? data<A>(*dots) : nullptr,
                           {}};
    const bool aligned = is_aligned(args.source, args.source_stride);
    const bool held = with_tile_config<Raw, 2>(n, aligned, [&](auto threads, auto vectors) {
      device.launch<threads>(softmax_backward_rows<Raw, threads, vectors>, rows, args);
    });
    if (held) return;
    constexpr int T = kSplit.threads, V = vectors_of<Raw, 2>(kSplit), W = vectors_of<Raw, 4>(kSplit);
    launch_fronts<T, Raw, 2>(device, softmax_backward_fronts<Raw, T, V, W>, source, rows, n, u ? 1 : 0, false, args);
  });
  return grad;
}

}  // namespace

Tensor softmax_backward(Tensor source, std::optional<Tensor> statistics, std::optional<Tensor> target,
                        std::optional<Tensor> grad_log_density, std::optional<Tensor> grad_cross_entropy,
                        std::optional<Tensor> grad_softmax, double label_smoothing, int64_t ignore_index,
                        double scale) {
  return run_backward("softmax_backward", softmax_backward_calls, source, statistics, target, grad_log_density,
                      grad_cross_entropy, grad_softmax, label_smoothing, ignore_index, scale, nullptr);
}

std::tuple<Tensor, Tensor> softmax_double_backward(Tensor source, std::optional<Tensor> statistics,
                                                   std::optional<Tensor> target,
                                                   std::optional<Tensor> grad_log_density,
                                                   std::optional<Tensor> grad_cross_entropy, Tensor v,
                                                   int64_t ignore_index) {
  Tensor dots;
  Tensor grad = run_backward("softmax_double_backward", softmax_double_backward_calls, source, statistics, target,
                             grad_log_density, grad_cross_entropy, v, 0.0, ignore_index, 1.0, &dots);
  return {grad, dots};
}

}  // namespace densreg::cuda
