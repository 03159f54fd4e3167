// Vectors as GCC and clang write them, for one instruction set at a time.
//
// Kernel bodies are templates over the vector's size in bytes and always inlined into wrappers that carry the target
// attribute (run_* in dispatch.h): one source, three machine codes, chosen when the first kernel runs. Nothing here may
// call a function that is not inlined, or use a lambda: those would not inherit the target.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define DENSREG_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#include <emmintrin.h>
#define DENSREG_AVX2 __attribute__((target("avx2,fma,bmi,bmi2")))
#define DENSREG_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi,bmi2,prefer-vector-width=512")))
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a function that is not inlined

namespace densreg::cpu {

enum class Isa { scalar, avx2, avx512 };

// The widest instruction set of this processor, or the one that DENSREG_CPU_CAPABILITY names (and the processor has).
Isa isa();
const char* isa_name();

// A vector of accumulators (float or double), and integers of the same width.
template <class T, int BYTES>
struct Vector {
  static constexpr int width = BYTES / sizeof(T);
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Scalar = T;
  typedef T F __attribute__((vector_size(BYTES)));
  typedef Int I __attribute__((vector_size(BYTES)));
};

// How a dtype is stored, and what its sums are taken in.
struct F32 {
  using Raw = float;
  using Acc = float;
};
struct F64 {
  using Raw = double;
  using Acc = double;
};
struct BF16 {
  using Raw = uint16_t;
  using Acc = float;
};
struct F16 {
  using Raw = uint16_t;
  using Acc = float;
};

template <class To, class From>
DENSREG_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class T>
DENSREG_INLINE V splat(T value) {
  const V zero = {};
  return static_cast<std::remove_cvref_t<decltype(zero[0])>>(value) - zero;  // 0 + -0 would be +0
}

// Select: a where the mask is set. The comparison of two vectors is such a mask.
template <class I, class F>
DENSREG_INLINE F select(I mask, F a, F b) {
  return mask ? a : b;
}

// --- half precision, in integer arithmetic: right for subnormals, infinities and NaN, and the same in every build

template <class V>
DENSREG_INLINE typename V::F widen(const uint16_t* p, BF16) {
  typedef uint16_t H __attribute__((vector_size(V::width * 2)));
  H h;
  std::memcpy(&h, p, sizeof(h));
  return bits<typename V::F>(__builtin_convertvector(h, typename V::I) << 16);
}

template <class V>
DENSREG_INLINE typename V::F widen(const uint16_t* p, F16) {
  typedef uint16_t H __attribute__((vector_size(V::width * 2)));
  using I = typename V::I;
  using F = typename V::F;
  H h;
  std::memcpy(&h, p, sizeof(h));
  I wide = __builtin_convertvector(h, I);
  const I magnitude = wide & 0x7fff;
  // The exponent's bias differs by 112. A subnormal goes through an integer: as a float it might be flushed to zero.
  const I normal = (magnitude << 13) + (112 << 23);
  const I subnormal = bits<I>(__builtin_convertvector(magnitude, F) * 0x1p-24f);
  const I special = (magnitude << 13) | 0x7f800000;
  const I result = select(magnitude >= 0x7c00, special, select(magnitude < 0x0400, subnormal, normal));
  return bits<F>(result | ((wide & 0x8000) << 16));
}

template <class V>
DENSREG_INLINE void narrow(typename V::F f, uint16_t* p, BF16) {
  typedef uint16_t H __attribute__((vector_size(V::width * 2)));
  using I = typename V::I;
  I u = bits<I>(f);
  I rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  I nan = (u >> 16) | 0x40;
  I result = select(f != f, nan, rounded);
  H h = __builtin_convertvector(result & 0xffff, H);
  std::memcpy(p, &h, sizeof(h));
}

template <class V>
DENSREG_INLINE void narrow(typename V::F f, uint16_t* p, F16) {
  typedef uint16_t H __attribute__((vector_size(V::width * 2)));
  using I = typename V::I;
  using F = typename V::F;
  I u = bits<I>(f);
  I sign = (u >> 16) & 0x8000;
  I a = u & 0x7fffffff;
  // Subnormal results: adding 0.5 rounds at the last place of fp16's subnormals.
  I subnormal = bits<I>(bits<F>(a) + 0.5f) - 0x3f000000;
  I normal = (a + (int32_t)0xc8000fff + ((a >> 13) & 1)) >> 13;
  I result = select(a < 0x38800000, subnormal, normal);
  result = select(a >= 0x477ff000, splat<I>(0x7c00), result);  // rounds to infinity
  result = select(a > 0x7f800000, splat<I>(0x7e00), result);
  H h = __builtin_convertvector((result | sign) & 0xffff, H);
  std::memcpy(p, &h, sizeof(h));
}

// --- loads and stores of V::width elements

template <class S, class V>
DENSREG_INLINE typename V::F load(const typename S::Raw* p) {
  if constexpr (sizeof(typename S::Raw) == sizeof(typename S::Acc)) {
    typename V::F f;
    std::memcpy(&f, p, sizeof(f));
    return f;
  } else {
    return widen<V>(p, S{});
  }
}

template <class S, class V>
DENSREG_INLINE void store(typename V::F f, typename S::Raw* p) {
  if constexpr (sizeof(typename S::Raw) == sizeof(typename S::Acc)) {
    std::memcpy(p, &f, sizeof(f));
  } else {
    narrow<V>(f, p, S{});
  }
}

// Past the caches: the line is not read before it is written. p is aligned to 16 bytes; stream_fence orders it before later stores.
template <class S, class V>
DENSREG_INLINE void stream(typename V::F f, typename S::Raw* p) {
#if defined(__x86_64__)
  alignas(64) typename S::Raw line[V::width];
  store<S, V>(f, line);
  constexpr int bytes = V::width * sizeof(typename S::Raw);
  static_assert(bytes % 8 == 0);
  if constexpr (bytes >= 16) {
#pragma GCC unroll 4
    for (int i = 0; i < bytes; i += 16) {
      __m128i part;
      std::memcpy(&part, reinterpret_cast<const char*>(line) + i, 16);
      _mm_stream_si128(reinterpret_cast<__m128i*>(reinterpret_cast<char*>(p) + i), part);
    }
  } else {
    std::memcpy(p, line, bytes);
  }
#else
  store<S, V>(f, p);
#endif
}

DENSREG_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One element, by the same conversions.
template <class S>
DENSREG_INLINE typename S::Acc load_one(const typename S::Raw* p) {
  if constexpr (sizeof(typename S::Raw) == sizeof(typename S::Acc)) {
    return *p;
  } else {
    uint16_t four[4] = {*p, 0, 0, 0};
    return load<S, Vector<float, 16>>(four)[0];
  }
}

template <class S>
DENSREG_INLINE void store_one(typename S::Acc f, typename S::Raw* p) {
  if constexpr (sizeof(typename S::Raw) == sizeof(typename S::Acc)) {
    *p = f;
  } else {
    uint16_t four[4];
    store<S, Vector<float, 16>>(splat<Vector<float, 16>::F>(f), four);
    *p = four[0];
  }
}

template <class V, class F = typename V::F>
DENSREG_INLINE typename V::I lanes() {
  typename V::I i = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < V::width; ++lane) i[lane] = lane;
  return i;
}

template <class F>
DENSREG_INLINE F max(F a, F b) {  // of a NaN and a number, b
  return a > b ? a : b;
}

// Halves added to halves: one lane after the other would take longer than a row of a hundred classes.
template <class T, int BYTES, bool MAX>
DENSREG_INLINE T reduce(typename Vector<T, BYTES>::F f) {
  if constexpr (BYTES > 16) {
    using Half = typename Vector<T, BYTES / 2>::F;
    Half halves[2];
    std::memcpy(halves, &f, sizeof(f));
    return reduce<T, BYTES / 2, MAX>(MAX ? max(halves[0], halves[1]) : halves[0] + halves[1]);
  } else {
    T result = f[0];
    for (int lane = 1; lane < Vector<T, BYTES>::width; ++lane) {
      result = MAX ? max<T>(f[lane], result) : result + f[lane];
    }
    return result;
  }
}

template <class V>
DENSREG_INLINE auto reduce_add(typename V::F f) {
  return reduce<typename V::Scalar, sizeof(f), false>(f);
}

template <class V>
DENSREG_INLINE auto reduce_max(typename V::F f) {
  return reduce<typename V::Scalar, sizeof(f), true>(f);
}

// --- exp and log

// exp(f - m) for f <= m to about one unit in the last place; 0 below the smallest normal result, NaN for NaN. m is a
// number, or one for each lane. The difference is taken exactly, as x + low: at f - m = -80 its rounding alone would
// cost 4e-6 in float32.
template <class V, class M>
DENSREG_INLINE typename V::F exp_difference(typename V::F f, M m) {
  using F = typename V::F;
  using I = typename V::I;
  using T = typename V::Scalar;
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? T(-87.33654) : T(-708.39641853226408);  // log of the smallest normal number
  const F bound = splat<F>(0) + (m + lowest);
  const F g = f < bound ? bound : f;  // -inf too, which would make low a NaN
  const F x = g - m;
  const F b = x - g;
  const F low = (g - (x - b)) - (m + b);
  F y;
  if constexpr (single) {
    const float magic = 0x1.8p23f;
    const F shifted = x * 1.44269504088896341f + magic;
    const F n = shifted - magic;
    F r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f + low;
    y = splat<F>(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y = y * bits<F>((bits<I>(shifted) - 0x4b400000 + 127) << 23);
  } else {
    const double magic = 0x1.8p52;
    const F shifted = x * 1.4426950408889634074 + magic;
    const F n = shifted - magic;
    F r = x - n * 6.93147180369123816490e-01;
    r = r - n * 1.90821492927058770002e-10 + low;
    y = splat<F>(1.0 / 6227020800.0);
    y = y * r + 1.0 / 479001600.0;
    y = y * r + 1.0 / 39916800.0;
    y = y * r + 1.0 / 3628800.0;
    y = y * r + 1.0 / 362880.0;
    y = y * r + 1.0 / 40320.0;
    y = y * r + 1.0 / 5040.0;
    y = y * r + 1.0 / 720.0;
    y = y * r + 1.0 / 120.0;
    y = y * r + 1.0 / 24.0;
    y = y * r + 1.0 / 6.0;
    y = y * r + 0.5;
    y = y * r * r + r + 1.0;
    y = y * bits<F>((bits<I>(shifted) - 0x4338000000000000 + 1023) << 52);
  }
  return f < bound ? F{} : y;
}

// exp(x) for x <= 0, as above.
template <class V>
DENSREG_INLINE typename V::F exp_nonpositive(typename V::F x) {
  return exp_difference<V>(x, typename V::Scalar(0));
}

// log(x) for x in [smallest normal, 1]; what comes out for 0 is finite and very negative.
template <class V>
DENSREG_INLINE typename V::F log_unit(typename V::F x) {
  using F = typename V::F;
  using I = typename V::I;
  if constexpr (sizeof(typename V::Int) == 4) {
    I u = bits<I>(x);
    I e = ((u - 0x3f3504f3) >> 23);  // x = 2^e m, m in [sqrt(1/2), sqrt(2))
    F m = bits<F>(u - (e << 23));
    F n = __builtin_convertvector(e, F);
    F f = m - 1.0f;
    F z = f * f;
    F y = splat<F>(7.0376836292e-2f);
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    y = y * f * z;
    y = y + n * -2.12194440e-4f;
    y = y - 0.5f * z;
    return f + y + n * 0.693359375f;
  } else {
    I u = bits<I>(x);
    I e = ((u - 0x3fe6a09e667f3bcd) >> 52);
    F m = bits<F>(u - (e << 52));
    F n = __builtin_convertvector(e, F);
    F f = m - 1.0;
    F s = f / (2.0 + f);
    F z = s * s;
    F r = splat<F>(1.479819860511658591e-01);
    r = r * z + 1.531383769920937332e-01;
    r = r * z + 1.818357216161805012e-01;
    r = r * z + 2.222219843214978396e-01;
    r = r * z + 2.857142874366239149e-01;
    r = r * z + 3.999999999940941908e-01;
    r = r * z + 6.666666666666735130e-01;
    r = r * z;
    F half = 0.5 * f * f;
    return n * 6.93147180369123816490e-01 - ((half - (s * (half + r) + n * 1.90821492927058770002e-10)) - f);
  }
}

}  // namespace densreg::cpu
