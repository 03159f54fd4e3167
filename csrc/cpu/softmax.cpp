// softmax, softmax_backward and softmax_double_backward on CPU. The mathematics is in densreg/ops/softmax.py.
#include "softmax.h"

#include <optional>
#include <tuple>

#include "dispatch.h"

namespace densreg::cpu {
namespace {

CallCounter softmax_calls("softmax", std::string("cpu-") + isa_name());
CallCounter softmax_backward_calls("softmax_backward", std::string("cpu-") + isa_name());
CallCounter softmax_double_backward_calls("softmax_double_backward", std::string("cpu-") + isa_name());

// Up to so many classes a vector holds one class of many rows; beyond, many classes of one row.
constexpr int64_t kAcrossRows = 32;
// Rows of more bytes do not stay in a core's L2 between two passes: online first pass, streaming stores.
constexpr int64_t kResidentBytes = 512 * 1024;
// Elements of a block of the online pass, which is read twice: once from memory, once from L1.
constexpr int64_t kBlock = 1024;

template <class S>
struct ForwardArgs {
  using Raw = typename S::Raw;
  using Acc = typename S::Acc;
  const Raw* logits;
  int64_t stride;  // between rows, in elements
  int64_t classes;
  const int64_t* target;  // or null
  int64_t ignore_index;
  double label_smoothing;
  Acc* log_density;
  Acc* cross_entropy;  // or null
  Raw* softmax;        // or null
  Acc* statistics;     // [2, rows]: m, then s
  int64_t rows;
  double scale;
};

template <class Acc>
DENSREG_INLINE void finish_row(Acc m, double s, bool nan, Acc f_y, double shortfall, int64_t y, int64_t ignore_index,
                               double smoothing, double classes, Acc* log_density, Acc* cross_entropy) {
  // An infinite maximum is the log density, as in torch.logsumexp; unless there is a NaN beside it.
  const double log_s = std::log(s);
  *log_density = std::isinf(m) ? (nan ? std::numeric_limits<Acc>::quiet_NaN() : m) : static_cast<Acc>(m + log_s);
  if (!cross_entropy) return;
  if (y == ignore_index) {
    *cross_entropy = 0;
    return;
  }
  // Not L - f_y: at logits of 1e4 the rounding of L would be all that is left.
  double ce = (static_cast<double>(m) - static_cast<double>(f_y)) + log_s;
  if (smoothing > 0) ce = (1 - smoothing) * ce + smoothing * (shortfall / classes + log_s);
  *cross_entropy = static_cast<Acc>(ce);
}

// sum_i (m - f_i), for label smoothing.
template <class S>
DENSREG_INLINE double shortfall_of(const typename S::Raw* f, int64_t n, typename S::Acc m) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(m) - static_cast<double>(load_one<S>(f + i));
  return total;
}

template <class S>
DENSREG_INLINE bool has_nan(const typename S::Raw* f, int64_t n) {
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    const auto x = load_one<S>(f + i);
    nan |= x != x;
  }
  return nan;
}

template <class S, int BYTES>
DENSREG_INLINE typename S::Acc row_max(const typename S::Raw* f, int64_t n) {  // n >= width
  using V = Vector<typename S::Acc, BYTES>;
  using F = typename V::F;
  constexpr int W = V::width;
  const F lowest = splat<F>(-std::numeric_limits<typename S::Acc>::infinity());
  F m0 = max(load<S, V>(f + n - W), lowest), m1 = lowest, m2 = lowest, m3 = lowest;  // the last vector overlaps
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = max(load<S, V>(f + i), m0);
    m1 = max(load<S, V>(f + i + W), m1);
    m2 = max(load<S, V>(f + i + 2 * W), m2);
    m3 = max(load<S, V>(f + i + 3 * W), m3);
  }
  for (; i + W <= n; i += W) m0 = max(load<S, V>(f + i), m0);
  return reduce_max<V>(max(max(m0, m1), max(m2, m3)));
}

// Sum of exp(f - m) over n >= width elements, n <= a few times kBlock; written to e where it is not null.
template <class S, int BYTES, bool WRITE>
DENSREG_INLINE double sum_exp(const typename S::Raw* f, int64_t n, typename S::Acc m, typename S::Acc* e) {
  using V = Vector<typename S::Acc, BYTES>;
  using F = typename V::F;
  constexpr int W = V::width;
  F s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    F a = exp_difference<V>(load<S, V>(f + i), m);
    F b = exp_difference<V>(load<S, V>(f + i + W), m);
    if constexpr (WRITE) {
      std::memcpy(e + i, &a, sizeof(a));
      std::memcpy(e + i + W, &b, sizeof(b));
    }
    s0 += a;
    s1 += b;
  }
  for (; i < n; i += W) {
    const int64_t at = i + W <= n ? i : n - W;  // the last vector overlaps: what was counted is masked
    F a = exp_difference<V>(load<S, V>(f + at), m);
    if constexpr (WRITE) std::memcpy(e + at, &a, sizeof(a));
    const typename V::Int counted = static_cast<typename V::Int>(i - at);
    s0 += select(lanes<V>() >= counted, a, F{});
  }
  return static_cast<double>(reduce_add<V>(s0 + s1));
}

struct ForwardRows {
  template <class S, int BYTES>
  static DENSREG_INLINE void run(const ForwardArgs<S>& a, int64_t begin, int64_t end) {
    using Acc = typename S::Acc;
    using Raw = typename S::Raw;
    using V = Vector<Acc, BYTES>;
    using F = typename V::F;
    constexpr int W = V::width;
    constexpr bool kInPlace = sizeof(Raw) == sizeof(Acc);  // exp(f - m) can wait in the output
    const int64_t n = a.classes;
    const bool resident = n * static_cast<int64_t>(sizeof(Raw)) <= kResidentBytes;
    for (int64_t row = begin; row < end; ++row) {
      const Raw* f = a.logits + row * a.stride;
      Raw* y = a.softmax ? a.softmax + row * n : nullptr;
      Acc m;
      double s = 0;
      const bool wait = kInPlace && y && resident;
      if (resident) {
        m = row_max<S, BYTES>(f, n);
        for (int64_t i = 0; i < n;) {
          const int64_t step = n - i < 2 * kBlock ? n - i : kBlock;  // no block shorter than a vector
          if constexpr (kInPlace) {
            s += wait ? sum_exp<S, BYTES, true>(f + i, step, m, reinterpret_cast<Acc*>(y) + i)
                      : sum_exp<S, BYTES, false>(f + i, step, m, nullptr);
          } else {
            s += sum_exp<S, BYTES, false>(f + i, step, m, nullptr);
          }
          i += step;
        }
      } else {
        m = -std::numeric_limits<Acc>::infinity();
        for (int64_t i = 0; i < n;) {
          const int64_t step = n - i < 2 * kBlock ? n - i : kBlock;
          const Acc block_max = row_max<S, BYTES>(f + i, step);
          if (block_max > m) {
            if (s != 0) s *= std::exp(static_cast<double>(m) - static_cast<double>(block_max));
            m = block_max;
          }
          // Nothing but -inf so far: nothing to add, and -inf - -inf would be NaN. A NaN is added.
          if (m != -std::numeric_limits<Acc>::infinity() || has_nan<S>(f + i, step)) {
            s += sum_exp<S, BYTES, false>(f + i, step, m, nullptr);
          }
          i += step;
        }
        // As the resident rows have it: a row of -inf has no softmax.
        if (m == -std::numeric_limits<Acc>::infinity()) s = std::numeric_limits<double>::quiet_NaN();
      }
      const int64_t target = a.target ? a.target[row] : 0;
      const bool counts = a.target && target != a.ignore_index;
      finish_row<Acc>(m, s, std::isinf(m) && has_nan<S>(f, n), counts ? load_one<S>(f + target) : Acc(0),
                      counts && a.label_smoothing > 0 ? shortfall_of<S>(f, n, m) : 0.0, target,
                      a.ignore_index, a.label_smoothing, static_cast<double>(n), a.log_density + row,
                      a.target ? a.cross_entropy + row : nullptr);
      a.statistics[row] = m;
      a.statistics[a.rows + row] = static_cast<Acc>(s);
      if (!y) continue;
      const Acc inverse = static_cast<Acc>(a.scale / s);
      if (wait) {
        const F last = load<S, V>(y + n - W) * inverse;
        for (int64_t i = 0; i + W <= n; i += W) store<S, V>(load<S, V>(y + i) * inverse, y + i);
        store<S, V>(last, y + n - W);
      } else if (resident) {
        for (int64_t i = 0; i < n; i += W) {
          const int64_t at = i + W <= n ? i : n - W;
          store<S, V>(exp_difference<V>(load<S, V>(f + at), m) * inverse, y + at);
        }
      } else {
        // An unaligned first vector, aligned streaming ones, and an unaligned last one.
        const int64_t head = (64 - reinterpret_cast<uintptr_t>(y) % 64) % 64 / sizeof(Raw);
        store<S, V>(exp_difference<V>(load<S, V>(f), m) * inverse, y);
        for (int64_t i = W; i < head; i += W) {
          store<S, V>(exp_difference<V>(load<S, V>(f + i), m) * inverse, y + i);
        }
        int64_t i = head;
        for (; i + W <= n; i += W) stream<S, V>(exp_difference<V>(load<S, V>(f + i), m) * inverse, y + i);
        stream_fence();
        store<S, V>(exp_difference<V>(load<S, V>(f + n - W), m) * inverse, y + n - W);
      }
    }
  }
};

struct ForwardAcross {
  template <class S, int BYTES>
  static DENSREG_INLINE void run(const ForwardArgs<S>& a, int64_t begin, int64_t end) {
    using Acc = typename S::Acc;
    using V = Vector<Acc, BYTES>;
    using F = typename V::F;
    constexpr int W = V::width;
    const int64_t n = a.classes;
    F e[kAcrossRows];
    for (int64_t first = begin; first < end; first += W) {
      const int count = static_cast<int>(end - first < W ? end - first : W);
      F m = splat<F>(-std::numeric_limits<Acc>::infinity());
      typename V::I nan = {};
      for (int64_t j = 0; j < n; ++j) {
        Acc column[W];
        for (int lane = 0; lane < W; ++lane) {
          column[lane] = load_one<S>(a.logits + (first + (lane < count ? lane : 0)) * a.stride + j);
        }
        std::memcpy(&e[j], column, sizeof(F));
        m = max(e[j], m);
        nan |= e[j] != e[j];
      }
      F s = {};
      F shortfall = {};
      F f_y = {};
      if (a.target) {
        for (int lane = 0; lane < count; ++lane) {
          const int64_t y = a.target[first + lane];
          if (y != a.ignore_index) f_y[lane] = load_one<S>(a.logits + (first + lane) * a.stride + y);
        }
      }
      for (int64_t j = 0; j < n; ++j) {
        shortfall += m - e[j];
        e[j] = exp_difference<V>(e[j], m);
        s += e[j];
      }
      for (int lane = 0; lane < count; ++lane) {
        finish_row<Acc>(m[lane], s[lane], nan[lane], f_y[lane], shortfall[lane],
                        a.target ? a.target[first + lane] : 0, a.ignore_index, a.label_smoothing,
                        static_cast<double>(n), a.log_density + first + lane,
                        a.target ? a.cross_entropy + first + lane : nullptr);
      }
      for (int lane = 0; lane < count; ++lane) {
        a.statistics[first + lane] = m[lane];
        a.statistics[a.rows + first + lane] = s[lane];
      }
      if (!a.softmax) continue;
      const F inverse = static_cast<Acc>(a.scale) / s;
      for (int64_t j = 0; j < n; ++j) {
        const F y = e[j] * inverse;
        for (int lane = 0; lane < count; ++lane) store_one<S>(y[lane], a.softmax + (first + lane) * n + j);
      }
    }
  }
};

// A number for each row, or none: of an expanded scalar, which is what a sum's backward brings, the stride is 0.
template <class Acc>
struct PerRow {
  const Acc* data;
  int64_t stride;
  DENSREG_INLINE operator bool() const { return data != nullptr; }
  DENSREG_INLINE Acc operator[](int64_t row) const { return data[row * stride]; }
};

template <class S>
struct BackwardArgs {
  using Raw = typename S::Raw;
  using Acc = typename S::Acc;
  const Raw* source;      // the softmax, or the logits
  int64_t source_stride;  // between rows
  const Acc* statistics;  // null where the source is the softmax
  int64_t rows;
  int64_t classes;
  const int64_t* target;    // or null
  PerRow<Acc> log_density;  // upstream gradients, or none
  PerRow<Acc> cross_entropy;
  const Raw* upstream;  // of the softmax, or null
  int64_t stride;       // between rows of upstream
  double label_smoothing;
  int64_t ignore_index;
  double scale;
  Raw* grad;
  Acc* dots;  // null; of the double backward, whose upstream is v, where <P, v> goes
};

// What a row of the gradient is: Q (c U + k) - uniform, less `hit` at the target; Q is P, or the softmax scale P.
template <class Acc>
struct BackwardRow {
  Acc m, inverse;  // of logits
  Acc c, k, uniform, hit;
  bool counts;
};

template <class S, class V, bool LOGITS>
DENSREG_INLINE typename V::F q_at(const typename S::Raw* source, const BackwardRow<typename S::Acc>& r) {
  const typename V::F f = load<S, V>(source);
  if constexpr (LOGITS) return exp_difference<V>(f, r.m) * r.inverse;
  return f;
}

template <class S, class V, bool LOGITS>
DENSREG_INLINE typename V::F grad_at(const typename S::Raw* source, const typename S::Raw* u,
                                     const BackwardRow<typename S::Acc>& r) {
  using F = typename V::F;
  const F weight = u ? load<S, V>(u) * r.c + r.k : splat<F>(r.k);
  return q_at<S, V, LOGITS>(source, r) * weight - r.uniform;
}

template <bool LOGITS>
struct BackwardRows {
  template <class S, int BYTES>
  static DENSREG_INLINE void run(const BackwardArgs<S>& a, int64_t begin, int64_t end) {
    using Acc = typename S::Acc;
    using Raw = typename S::Raw;
    using V = Vector<Acc, BYTES>;
    using F = typename V::F;
    constexpr int W = V::width;
    const int64_t n = a.classes;
    const bool resident = n * static_cast<int64_t>(sizeof(Raw)) <= kResidentBytes;
    for (int64_t row = begin; row < end; ++row) {
      const Raw* y = a.source + row * a.source_stride;
      const Raw* u = a.upstream ? a.upstream + row * a.stride : nullptr;
      Raw* g = a.grad + row * n;
      BackwardRow<Acc> r;
      r.m = LOGITS ? a.statistics[row] : Acc(0);
      r.inverse = LOGITS ? 1 / a.statistics[a.rows + row] : Acc(1);
      // <Q, U>, in blocks: a running sum over a million classes would lose digits.
      double dot = 0;
      if (u) {
        for (int64_t block = 0; block < n;) {
          const int64_t stop = n - block < 2 * kBlock ? n : block + kBlock;  // no block shorter than a vector
          F d0 = {}, d1 = {};
          int64_t i = block;
          for (; i + 2 * W <= stop; i += 2 * W) {
            d0 += q_at<S, V, LOGITS>(y + i, r) * load<S, V>(u + i);
            d1 += q_at<S, V, LOGITS>(y + i + W, r) * load<S, V>(u + i + W);
          }
          for (; i < stop; i += W) {
            const int64_t at = i + W <= stop ? i : stop - W;  // the last vector overlaps: what was counted is masked
            const typename V::Int counted = static_cast<typename V::Int>(i - at);
            d0 += select(lanes<V>() >= counted, q_at<S, V, LOGITS>(y + at, r) * load<S, V>(u + at), F{});
          }
          dot += static_cast<double>(reduce_add<V>(d0 + d1));
          block = stop;
        }
      }
      r.counts = a.cross_entropy && a.target && a.target[row] != a.ignore_index;
      const double ce = r.counts ? static_cast<double>(a.cross_entropy[row]) : 0.0;
      const double weight = (a.log_density ? static_cast<double>(a.log_density[row]) : 0.0) + ce;
      // P (weight + scale U - <P, scale U>); with Y = scale P it is Y (U + (weight - <Y, U>) / scale).
      r.c = LOGITS ? static_cast<Acc>(a.scale) : Acc(1);
      r.k = static_cast<Acc>(LOGITS ? weight - a.scale * dot : (weight - dot) / a.scale);
      r.uniform = static_cast<Acc>(ce * a.label_smoothing / static_cast<double>(n));
      r.hit = static_cast<Acc>(ce * (1 - a.label_smoothing));
      if (a.dots) {
        a.dots[row] = static_cast<Acc>(dot);
        r.c = static_cast<Acc>(weight);
        r.k = static_cast<Acc>(-weight * dot);
        r.uniform = 0;
        r.counts = false;
      }
      if (resident) {
        for (int64_t i = 0; i < n; i += W) {
          const int64_t at = i + W <= n ? i : n - W;
          store<S, V>(grad_at<S, V, LOGITS>(y + at, u ? u + at : nullptr, r), g + at);
        }
      } else {
        const int64_t head = (64 - reinterpret_cast<uintptr_t>(g) % 64) % 64 / sizeof(Raw);
        for (int64_t i = 0; i == 0 || i < head; i += W) {
          store<S, V>(grad_at<S, V, LOGITS>(y + i, u ? u + i : nullptr, r), g + i);
        }
        for (int64_t i = head; i + W <= n; i += W) {
          stream<S, V>(grad_at<S, V, LOGITS>(y + i, u ? u + i : nullptr, r), g + i);
        }
        stream_fence();
        store<S, V>(grad_at<S, V, LOGITS>(y + n - W, u ? u + n - W : nullptr, r), g + n - W);
      }
      if (r.counts) {
        const int64_t t = a.target[row];
        const int64_t at = t + W <= n ? t : n - W;
        store_one<S>(grad_at<S, V, LOGITS>(y + at, u ? u + at : nullptr, r)[t - at] - r.hit, g + t);
      }
    }
  }
};

template <bool LOGITS>
struct BackwardAcross {
  template <class S, int BYTES>
  static DENSREG_INLINE void run(const BackwardArgs<S>& a, int64_t begin, int64_t end) {
    using Acc = typename S::Acc;
    using V = Vector<Acc, BYTES>;
    using F = typename V::F;
    constexpr int W = V::width;
    const int64_t n = a.classes;
    F q[kAcrossRows], u[kAcrossRows];
    for (int64_t first = begin; first < end; first += W) {
      const int count = static_cast<int>(end - first < W ? end - first : W);
      F m = {}, inverse = splat<F>(1), weight = {}, ce = {};
      for (int lane = 0; lane < count; ++lane) {
        const int64_t row = first + lane;
        if constexpr (LOGITS) {
          m[lane] = a.statistics[row];
          inverse[lane] = 1 / a.statistics[a.rows + row];
        }
        if (a.log_density) weight[lane] = a.log_density[row];
        if (a.cross_entropy && a.target && a.target[row] != a.ignore_index) ce[lane] = a.cross_entropy[row];
      }
      F dot = {};
      for (int64_t j = 0; j < n; ++j) {
        Acc column[W], upstream[W];
        for (int lane = 0; lane < W; ++lane) {
          const int64_t row = first + (lane < count ? lane : 0);
          column[lane] = load_one<S>(a.source + row * a.source_stride + j);
          upstream[lane] = a.upstream ? load_one<S>(a.upstream + row * a.stride + j) : Acc(0);
        }
        std::memcpy(&q[j], column, sizeof(F));
        std::memcpy(&u[j], upstream, sizeof(F));
        if constexpr (LOGITS) q[j] = exp_difference<V>(q[j], m) * inverse;
        dot += q[j] * u[j];
      }
      const Acc scale = static_cast<Acc>(a.scale);
      F c = splat<F>(LOGITS ? scale : Acc(1));
      F k = LOGITS ? weight + ce - scale * dot : (weight + ce - dot) / scale;
      F uniform = ce * static_cast<Acc>(a.label_smoothing / static_cast<double>(n));
      const F hit = ce * static_cast<Acc>(1 - a.label_smoothing);
      if (a.dots) {
        for (int lane = 0; lane < count; ++lane) a.dots[first + lane] = dot[lane];
        c = weight + ce;
        k = -c * dot;
        uniform = F{};
      }
      for (int64_t j = 0; j < n; ++j) {
        F g = q[j] * (u[j] * c + k) - uniform;
        if (a.cross_entropy && a.target && !a.dots) {
          for (int lane = 0; lane < count; ++lane) {
            if (a.target[first + lane] == j) g[lane] -= hit[lane];
          }
        }
        for (int lane = 0; lane < count; ++lane) store_one<S>(g[lane], a.grad + (first + lane) * n + j);
      }
    }
  }
};

void check_rows(const char* op, const char* what, const std::optional<Tensor>& t, int64_t rows) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == rows && t->is_cpu(), "densreg::", op, ": ", what,
                  " must be a CPU tensor of shape [", rows, "]");
}

void check_matrix(const char* op, const char* what, const Tensor& t, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns) &&
                      t.is_cpu(),
                  "densreg::", op, ": ", what, " must be a matrix on the CPU, of the shape of the other arguments");
}

// The class of each row, contiguous, so that what the kernels read is what was checked.
std::optional<Tensor> checked_target(const char* op, const std::optional<Tensor>& target, int64_t rows,
                                     int64_t classes, int64_t ignore_index) {
  check_rows(op, "target", target, rows);
  const auto dense = contiguous(target);
  if (!dense) return dense;
  STD_TORCH_CHECK(dense->scalar_type() == ScalarType::Long, "densreg::", op, ": target must hold int64 classes");
  const auto* y = static_cast<const int64_t*>(dense->data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK((y[i] >= 0 && y[i] < classes) || y[i] == ignore_index, "densreg::", op,
                    ": expected classes in [0, ", classes, ") or ignore_index=", ignore_index,
                    " in target, got class ", y[i]);
  }
  return dense;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax(Tensor logits, std::optional<Tensor> target, double label_smoothing,
                                                   int64_t ignore_index, bool need_softmax, double scale) {
  check_matrix("softmax", "logits", logits, -1, -1);
  target = checked_target("softmax", target, logits.size(0), logits.size(1), ignore_index);
  softmax_calls.add();
  logits = rows_contiguous(logits);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const auto row = row_dtype(logits.scalar_type());
  Tensor log_density = empty<1>({rows}, row);
  Tensor cross_entropy = empty<1>({target ? rows : 0}, row);
  Tensor softmax = need_softmax ? empty<2>({rows, classes}, logits.scalar_type())
                                : empty<1>({0}, logits.scalar_type());
  Tensor statistics = empty<2>({2, rows}, row);
  for_dtype(logits.scalar_type(), "softmax", [&](auto storage) {
    using S = decltype(storage);
    using Raw = typename S::Raw;
    using Acc = typename S::Acc;
    const ForwardArgs<S> args{static_cast<const Raw*>(logits.data_ptr()),
                              rows > 1 ? logits.stride(0) : classes,
                              classes,
                              data_or_null<int64_t>(target),
                              ignore_index,
                              label_smoothing,
                              static_cast<Acc*>(log_density.data_ptr()),
                              static_cast<Acc*>(cross_entropy.data_ptr()),
                              need_softmax ? static_cast<Raw*>(softmax.data_ptr()) : nullptr,
                              static_cast<Acc*>(statistics.data_ptr()),
                              rows,
                              scale};
    if (classes <= kAcrossRows) {
      parallel_rows<ForwardAcross, S>(args, rows, classes, 16);
    } else {
      parallel_rows<ForwardRows, S>(args, rows, classes);
    }
  });
  return {log_density, cross_entropy, softmax, statistics};
}

namespace {

template <class Acc>
PerRow<Acc> per_row(const std::optional<Tensor>& t) {
  return t ? PerRow<Acc>{static_cast<const Acc*>(t->data_ptr()), t->stride(0)} : PerRow<Acc>{nullptr, 0};
}

std::optional<Tensor> as(const std::optional<Tensor>& t, ScalarType dtype) {
  return !t || t->scalar_type() == dtype ? t : torch::stable::to(*t, dtype);
}

// The backward, or with `dots` the double backward.
Tensor run_backward(const char* op, CallCounter& counter, Tensor source, const std::optional<Tensor>& statistics,
                    const std::optional<Tensor>& target, const std::optional<Tensor>& grad_log_density,
                    const std::optional<Tensor>& grad_cross_entropy, const std::optional<Tensor>& upstream,
                    double label_smoothing, int64_t ignore_index, double scale, Tensor* dots) {
  check_matrix(op, "source", source, -1, -1);
  const int64_t rows = source.size(0), classes = source.size(1);
  const auto dtype = source.scalar_type();
  if (statistics) check_matrix(op, "statistics", *statistics, 2, rows);
  check_rows(op, "grad_log_density", grad_log_density, rows);
  check_rows(op, "grad_cross_entropy", grad_cross_entropy, rows);
  if (upstream) {
    const char* name = dots ? "v" : "grad_softmax";
    check_matrix(op, name, *upstream, rows, classes);
    STD_TORCH_CHECK(upstream->scalar_type() == dtype, "densreg::", op, ": ", name,
                    " must have the dtype of the source");
  }
  // Checked again: since the forward it may have changed.
  const auto y = checked_target(op, target, rows, classes, ignore_index);
  counter.add();
  source = rows_contiguous(source);
  Tensor grad = empty<2>({rows, classes}, dtype);
  if (dots) *dots = empty<1>({rows}, row_dtype(dtype));
  const auto stats = contiguous_as(statistics, row_dtype(dtype));
  const auto l = as(grad_log_density, row_dtype(dtype));
  const auto a = as(grad_cross_entropy, row_dtype(dtype));
  std::optional<Tensor> u;
  if (upstream) u = rows_contiguous(*upstream);
  for_dtype(dtype, op, [&](auto storage) {
    using S = decltype(storage);
    using Raw = typename S::Raw;
    using Acc = typename S::Acc;
    const BackwardArgs<S> args{static_cast<const Raw*>(source.data_ptr()),
                               rows > 1 ? source.stride(0) : classes,
                               data_or_null<Acc>(stats),
                               rows,
                               classes,
                               data_or_null<int64_t>(y),
                               per_row<Acc>(l),
                               per_row<Acc>(a),
                               data_or_null<Raw>(u),
                               u && rows > 1 ? u->stride(0) : classes,
                               label_smoothing,
                               ignore_index,
                               scale,
                               static_cast<Raw*>(grad.data_ptr()),
                               dots ? static_cast<Acc*>(dots->data_ptr()) : nullptr};
    if (classes <= kAcrossRows) {
      stats ? parallel_rows<BackwardAcross<true>, S>(args, rows, classes, 16)
            : parallel_rows<BackwardAcross<false>, S>(args, rows, classes, 16);
    } else {
      stats ? parallel_rows<BackwardRows<true>, S>(args, rows, classes)
            : parallel_rows<BackwardRows<false>, S>(args, rows, classes);
    }
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

}  // namespace densreg::cpu
