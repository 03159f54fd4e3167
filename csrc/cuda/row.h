// A row as threads share it: vectors of 16 bytes in and out, and reductions over the threads of a row.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define DENSREG_DEVICE __device__ __forceinline__

namespace densreg::cuda {

// What sums of a storage type are taken in.
template <class Raw>
using Acc = std::conditional_t<std::is_same_v<Raw, double>, double, float>;

// Elements of a vector of 16 bytes.
template <class Raw>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(Raw));

template <class A>
inline constexpr A kInfinity = std::numeric_limits<A>::infinity();

// A thread group is the T threads that share a row, or a chunk of one. Up to a warp several groups make a block; a
// larger group is a block. No thread leaves early: the shuffles and barriers below need all of them.
template <int T>
struct Group {
  static constexpr int kThreads = T <= 32 ? 128 : T;  // of a block
  static constexpr int kGroups = kThreads / T;        // in a block

  static DENSREG_DEVICE int64_t row() { return static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / T; }
  static DENSREG_DEVICE int lane() { return static_cast<int>(threadIdx.x) % T; }
};

struct Max {  // of a NaN and a number, the number
  DENSREG_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
  DENSREG_DEVICE double operator()(double a, double b) const { return fmax(a, b); }
  template <class Integer>
  DENSREG_DEVICE Integer operator()(Integer a, Integer b) const {
    return a > b ? a : b;
  }
};

struct Sum {
  template <class X>
  DENSREG_DEVICE X operator()(X a, X b) const {
    return a + b;
  }
};

// The same result, to the last bit, in every thread of the group.
template <int T, class X, class Op>
DENSREG_DEVICE X group_reduce(X x, Op op) {
#pragma unroll
  for (int offset = (T < 32 ? T : 32) / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  if constexpr (T > 32) {
    __shared__ X of_warp[T / 32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[threadIdx.x % (T / 32)];
#pragma unroll
    for (int offset = T / 64; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
    __syncthreads();  // before the next reduction writes there
  }
  return x;
}

// Whether memory is read again soon: what is not need not stay in the L2, where it would displace what is.
enum class Use { again, last };

// A row, or a chunk of one, cut where memory is aligned to 16 bytes. Vector k holds the elements from k N - shift on:
// the first and the last may reach past the ends, and go element by element. Other rows of the same cut (the gradient
// of a softmax, an output) are vectors where their memory is aligned alike.
struct Cut {
  int n;
  int shift;  // elements between the last aligned address and the row

  template <class Raw>
  static DENSREG_DEVICE int shift_of(const Raw* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(Raw));
  }

  template <class Raw>
  DENSREG_DEVICE bool fits(const Raw* p) const {
    return shift_of(p) == shift;
  }

  template <class Raw>
  DENSREG_DEVICE int vectors() const {
    return n > 0 ? (n + shift + kLanes<Raw> - 1) / kLanes<Raw> : 0;
  }

  template <class Raw>
  DENSREG_DEVICE int first(int k) const {
    return k * kLanes<Raw> - shift;
  }

  DENSREG_DEVICE bool holds(int i) const { return i >= 0 && i < n; }

  template <Use USE = Use::again, class Raw>
  DENSREG_DEVICE void load(const Raw* p, int k, Acc<Raw> past_the_ends, Acc<Raw> (&x)[kLanes<Raw>]) const {
    constexpr int N = kLanes<Raw>;
    const int i = first<Raw>(k);
    if (i >= 0 && i + N <= n && fits(p)) {
      const uint4* at = reinterpret_cast<const uint4*>(p + i);
      const uint4 bits = USE == Use::last ? __ldcs(at) : *at;
      Raw raw[N];
      std::memcpy(raw, &bits, sizeof(bits));
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = static_cast<Acc<Raw>>(raw[e]);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = holds(i + e) ? static_cast<Acc<Raw>>(p[i + e]) : past_the_ends;
    }
  }

  template <Use USE = Use::again, class Raw>
  DENSREG_DEVICE void store(Raw* p, int k, const Acc<Raw> (&x)[kLanes<Raw>]) const {
    constexpr int N = kLanes<Raw>;
    const int i = first<Raw>(k);
    if (i >= 0 && i + N <= n && fits(p)) {
      Raw raw[N];
#pragma unroll
      for (int e = 0; e < N; ++e) raw[e] = static_cast<Raw>(x[e]);
      uint4 bits;
      std::memcpy(&bits, raw, sizeof(bits));
      uint4* at = reinterpret_cast<uint4*>(p + i);
      if constexpr (USE == Use::last) {
        __stcs(at, bits);
      } else {
        *at = bits;
      }
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (holds(i + e)) p[i + e] = static_cast<Raw>(x[e]);
      }
    }
  }
};

// A row that does not fit in one tile is split into chunks, each the work of one block of kSplit.threads.
struct Split {
  int64_t chunks;  // of a row
  int64_t size;    // elements of a chunk, the last one of a row excepted; below 2^31

  DENSREG_DEVICE int64_t begin(int64_t chunk) const { return chunk * size; }
  DENSREG_DEVICE int length(int64_t chunk, int64_t n) const {
    const int64_t left = n - begin(chunk);
    return static_cast<int>(left < size ? left : size);
  }
};

// --- the functions of one number that CUDA has under two names

DENSREG_DEVICE float exponential(float x) { return expf(x); }
DENSREG_DEVICE double exponential(double x) { return exp(x); }
DENSREG_DEVICE float logarithm(float x) { return logf(x); }
DENSREG_DEVICE double logarithm(double x) { return log(x); }
DENSREG_DEVICE float power(float x, float p) { return powf(x, p); }
// As csrc/cpu has it: pow, exact for numbers beyond [0, 1] too, is a call that spills registers.
DENSREG_DEVICE double power(double x, double p) { return exp(p * log(x)); }
DENSREG_DEVICE float root(float x) { return sqrtf(x); }
DENSREG_DEVICE double root(double x) { return sqrt(x); }
DENSREG_DEVICE float magnitude(float x) { return fabsf(x); }
DENSREG_DEVICE double magnitude(double x) { return fabs(x); }

}  // namespace densreg::cuda
