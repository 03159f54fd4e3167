// softmax, softmax_backward and softmax_double_backward on CUDA. The mathematics is in densreg/ops/softmax.py.
//
// A row that fits in one tile is read once (softmax_rows, softmax_backward_rows). A longer one is split into chunks: a
// kernel leaves the sums of every chunk, the next adds up those of its row and goes over its chunk again.
#include "softmax.h"

#include "launch.h"

namespace densreg::cuda {
namespace {

CallCounter softmax_calls("softmax", "cuda");
CallCounter softmax_backward_calls("softmax_backward", "cuda");
CallCounter softmax_double_backward_calls("softmax_double_backward", "cuda");

// exp(f - m) for f <= m, also for m infinite as base() has it. In float32 and float64 the difference is taken exactly,
// as x + low: at f - m = -80 its rounding alone would cost 4e-6 in float32. Half precision rounds P far more than that.
template <class Raw>
DENSREG_DEVICE Acc<Raw> exp_difference(Acc<Raw> f, Acc<Raw> m) {
  using A = Acc<Raw>;
  const A x = f - m;
  const A y = exponential(x);
  if constexpr (sizeof(Raw) == 2) return y;
  const A b = x - f;
  const A rest = y * ((f - (x - b)) - (m + b));
  return magnitude(rest) < y ? y + rest : y;  // not where it is a NaN: at infinities
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
  Split split;
  A* partial;  // [3, rows * chunks]: of each chunk m, s, and sum_i (base(m) - f_i) for label smoothing
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
      x[j][e] = exp_difference<Raw>(x[j][e], b);
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

// The sums of a chunk, in partial.
template <class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads) softmax_partial(ForwardArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int64_t row = blockIdx.x, chunk = blockIdx.y, item = row * a.split.chunks + chunk;
  const int lane = Group<T>::lane();
  const Raw* f = a.logits + row * a.stride + a.split.begin(chunk);
  const Cut cut{a.split.length(chunk, a.classes), Cut::shift_of(f)};
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
      for (int e = 0; e < N; ++e) s += exp_difference<Raw>(x[j][e], b);
    }
  }
  s = group_reduce<T>(s, Sum{});
  if (a.label_smoothing > 0) shortfall = group_reduce<T>(shortfall, Sum{});
  if (lane == 0) {
    const int64_t items = a.rows * a.split.chunks;
    a.partial[item] = m;
    a.partial[items + item] = s;
    a.partial[2 * items + item] = shortfall;
  }
}

// A row's sums from those of its chunks, and the softmax of one chunk; without a softmax a row has one block.
template <class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads) softmax_finish(ForwardArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const auto [row, chunk] = backwards();
  const int lane = Group<T>::lane();
  const int64_t items = a.rows * a.split.chunks;
  const A* partial = a.partial + row * a.split.chunks;
  A m = -kInfinity<A>, s = 0, shortfall = 0;
  for (int64_t c = lane; c < a.split.chunks; c += T) m = Max{}(m, partial[c]);
  m = group_reduce<T>(m, Max{});
  const A b = base(m);
  for (int64_t c = lane; c < a.split.chunks; c += T) {
    s += partial[items + c] * rescale(partial[c], m);
    if (a.label_smoothing > 0) {
      const A length = static_cast<A>(a.split.length(c, a.classes));
      shortfall += partial[2 * items + c] + length * (b - base(partial[c]));
    }
  }
  s = group_reduce<T>(s, Sum{});
  if (a.label_smoothing > 0) shortfall = group_reduce<T>(shortfall, Sum{});
  if (lane == 0 && chunk == 0) finish_row(a, row, m, s, shortfall);
  if (!a.softmax) return;
  const A inverse = magnitude(m) == kInfinity<A> ? std::numeric_limits<A>::quiet_NaN() : a.scale / s;
  const Raw* f = a.logits + row * a.stride + a.split.begin(chunk);
  Raw* y = a.softmax + row * a.classes + a.split.begin(chunk);
  const Cut cut{a.split.length(chunk, a.classes), Cut::shift_of(f)};
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V) {
    A x[V][N];
#pragma unroll
    for (int j = 0; j < V; ++j) cut.load(f, tile + lane + j * T, -kInfinity<A>, x[j]);
#pragma unroll
    for (int j = 0; j < V; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) x[j][e] = exp_difference<Raw>(x[j][e], b) * inverse;
      cut.store(y, tile + lane + j * T, x[j]);
    }
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
  Split split;
  A* partial;  // [rows * chunks]: <Q, U> of each chunk, or null without an upstream gradient of the softmax
  A* dots;     // null; of the double backward, whose upstream is v, where <P, v> goes
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
  DENSREG_DEVICE void load(const Raw* p, const Cut& cut, int k, A (&q)[kLanes<Raw>]) const {
    cut.load(p, k, logits ? -kInfinity<A> : A(0), q);
    if (logits) {
#pragma unroll
      for (int e = 0; e < kLanes<Raw>; ++e) q[e] = exp_difference<Raw>(q[e], m) * inverse;
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
    for (int e = 0; e < kLanes<Raw>; ++e) {
      q[e] = q[e] * (u[e] * c + k) - uniform;
      if (at == e) q[e] -= hit;
    }
  }
};

template <class Raw>
DENSREG_DEVICE void load_upstream(const Raw* u, const Cut& cut, int k, Acc<Raw> (&x)[kLanes<Raw>]) {
  if (u) {
    cut.load(u, k, Acc<Raw>(0), x);
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

// <Q, U> of a chunk, in partial.
template <class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads) softmax_backward_partial(BackwardArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const int64_t row = blockIdx.x, chunk = blockIdx.y, item = row * a.split.chunks + chunk;
  const int lane = Group<T>::lane();
  const Raw* f = a.source + row * a.source_stride + a.split.begin(chunk);
  const Raw* upstream = a.upstream + row * a.upstream_stride + a.split.begin(chunk);
  const Cut cut{a.split.length(chunk, a.classes), Cut::shift_of(f)};
  const Source<Raw> source(a, row, true);
  A dot = 0;
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V) {
    A of_tile = 0;  // a running sum over a long chunk would lose digits
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A q[N], u[N];
      source.load(f, cut, tile + lane + j * T, q);
      load_upstream(upstream, cut, tile + lane + j * T, u);
#pragma unroll
      for (int e = 0; e < N; ++e) of_tile += q[e] * u[e];
    }
    dot += of_tile;
  }
  dot = group_reduce<T>(dot, Sum{});
  if (lane == 0) a.partial[item] = dot;
}

template <class Raw, int T, int V>
__global__ void __launch_bounds__(Group<T>::kThreads, 1) softmax_backward_finish(BackwardArgs<Raw> a) {
  using A = Acc<Raw>;
  constexpr int N = kLanes<Raw>;
  const auto [row, chunk] = backwards();
  const int lane = Group<T>::lane();
  A dot = 0;
  if (a.partial) {
    const A* partial = a.partial + row * a.split.chunks;
    for (int64_t c = lane; c < a.split.chunks; c += T) dot += partial[c];
    dot = group_reduce<T>(dot, Sum{});
  }
  const int64_t begin = a.split.begin(chunk);
  const Raw* f = a.source + row * a.source_stride + begin;
  const Raw* upstream = a.upstream ? a.upstream + row * a.upstream_stride + begin : nullptr;
  Raw* g = a.grad + row * a.classes + begin;
  const Cut cut{a.split.length(chunk, a.classes), Cut::shift_of(f)};
  const Source<Raw> source(a, row, true);
  if (a.dots && lane == 0 && chunk == 0) a.dots[row] = dot;
  const Gradient<Raw> gradient(a, row, dot);
  for (int tile = 0; tile < cut.vectors<Raw>(); tile += T * V) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A q[N], u[N];
      source.load(f, cut, tile + lane + j * T, q);
      load_upstream(upstream, cut, tile + lane + j * T, u);
      gradient.apply(cut, tile + lane + j * T, begin, q, u);
      cut.store(g, tile + lane + j * T, q);
    }
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
                          {},
                          nullptr};
    const bool aligned = is_aligned(args.logits, args.stride);
    const bool held = with_tile_config<Raw, 1>(n, aligned, [&](auto threads, auto vectors) {
      device.launch<threads>(softmax_rows<Raw, threads, vectors>, rows, args);
    });
    if (held) return;
    constexpr int T = kSplit.threads, V = vectors_of<Raw, 1>(kSplit);
    args.split = split_of<Raw>(n);
    const int64_t chunks = args.split.chunks;
    const Tensor partial = empty<2>(logits, {3, rows * chunks}, row);
    args.partial = data<A>(partial);
    device.launch<T>(softmax_partial<Raw, T, V>, rows, args, chunks);
    device.launch<T>(softmax_finish<Raw, T, vectors_of<Raw, 2>(kSplit)>, rows, args, need_softmax ? chunks : 1);
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
                           {},
                           nullptr,
                           dots ? data<A>(*dots) : nullptr};
    const bool aligned = is_aligned(args.source, args.source_stride);
    const bool held = with_tile_config<Raw, 2>(n, aligned, [&](auto threads, auto vectors) {
      device.launch<threads>(softmax_backward_rows<Raw, threads, vectors>, rows, args);
    });
    if (held) return;
    constexpr int T = kSplit.threads, V = vectors_of<Raw, 2>(kSplit);
    args.split = split_of<Raw>(n);
    const int64_t chunks = args.split.chunks;
    std::optional<Tensor> partial;
    if (u) {
      partial = empty<1>(source, {rows * chunks}, row);
      args.partial = data<A>(*partial);
      device.launch<T>(softmax_backward_partial<Raw, T, V>, rows, args, chunks);
    }
    device.launch<T>(softmax_backward_finish<Raw, T, V>, rows, args, chunks);
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
