// What csrc/cuda/*.cu need of CUDA, on the CPU: found instead of the toolkit's header, it lets g++ compile the very same
// sources, so that the tests run the kernels' logic without a GPU.
//
// The threads of a block are fibers: each runs until it reaches a shuffle or a barrier, and goes on when the others of
// its warp, or of its block, are there too. What CUDA leaves undefined ends the process: a shuffle or a barrier that
// some threads never reach. densreg_reverse(1) runs the threads in the opposite order, which shows what depends on an
// order that CUDA does not promise.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace emulation {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

enum class At { running, shuffle, barrier, end };

struct Fiber {
  static constexpr size_t kStack = 256 * 1024;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf jump;
  bool entered = false;
  At at = At::running;
  unsigned index = 0;
  int offset = 0;         // of the shuffle it waits at
  uint64_t slots[2] = {};  // what it gives in a shuffle; in turn, as a fast neighbour may be one shuffle ahead
  unsigned shuffles = 0;
};

struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t context;
  jmp_buf jump;
  dim3 block;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  bool reverse = false;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

#ifdef __SANITIZE_ADDRESS__  // which follows swapcontext; it is a system call, and slower
__attribute__((noinline)) inline void leave(Fiber& f) { swapcontext(&f.context, &machine().context); }
__attribute__((noinline)) inline void enter(Fiber& f) { swapcontext(&machine().context, &f.context); }
#else
__attribute__((noinline)) inline void leave(Fiber& f) {
  if (_setjmp(f.jump) == 0) _longjmp(machine().jump, 1);
}
__attribute__((noinline)) inline void enter(Fiber& f) {
  if (_setjmp(machine().jump) != 0) return;
  if (f.entered) _longjmp(f.jump, 1);
  f.entered = true;
  setcontext(&f.context);
}
#endif

inline void wait(At at) {
  Fiber& f = *machine().current;
  f.at = at;
  leave(f);
}

inline void life() {
  for (;;) {  // one kernel after the other
    machine().body(machine().arguments);
    wait(At::end);
  }
}

inline void resume(Fiber& f) {
  machine().current = &f;
  f.at = At::running;
  enter(f);
}

template <class F>
void in_order(unsigned n, F f) {
  for (unsigned i = 0; i < n; ++i) f(machine().reverse ? n - 1 - i : i);
}

// Runs a warp until all of it waits at a barrier, or has ended.
inline At run_warp(Fiber* lanes) {
  for (;;) {
    in_order(32, [&](unsigned i) { resume(lanes[i]); });
    for (int i = 1; i < 32; ++i) {
      if (lanes[i].at != lanes[0].at) fail("a shuffle or a barrier that part of a warp does not reach");
      if (lanes[i].at == At::shuffle && lanes[i].offset != lanes[0].offset) fail("two different shuffles in a warp");
    }
    if (lanes[0].at != At::shuffle) return lanes[0].at;
  }
}

inline void run_block(unsigned threads) {
  Machine& m = machine();
  if (threads == 0 || threads % 32 || threads > 1024) fail("a block that is not of 1 to 32 warps");
  while (m.fibers.size() < threads) {
    Fiber& f = m.fibers.emplace_back();
    f.index = static_cast<unsigned>(m.fibers.size()) - 1;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Fiber::kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, life, 0);
  }
  for (At all = At::barrier; all == At::barrier;) {
    std::vector<At> at(threads / 32);
    in_order(threads / 32, [&](unsigned w) { at[w] = run_warp(&m.fibers[w * 32]); });
    all = at[0];
    for (const At one : at) {
      if (one != all) fail("a barrier that part of a block does not reach");
    }
  }
}

struct Index {
  unsigned x;
};

}  // namespace emulation

#define threadIdx (emulation::Index{emulation::machine().current->index})
#define blockIdx (emulation::machine().block)
inline dim3 gridDim;

inline void __syncthreads() { emulation::wait(emulation::At::barrier); }

template <class X>
X __shfl_xor_sync(unsigned mask, X x, int offset) {
  static_assert(sizeof(X) <= 8);
  if (mask != 0xffffffffu) emulation::fail("a shuffle of part of a warp");
  emulation::Machine& m = emulation::machine();
  emulation::Fiber& f = *m.current;
  const unsigned turn = f.shuffles++ % 2;
  std::memcpy(&f.slots[turn], &x, sizeof(x));
  f.offset = offset;
  emulation::wait(emulation::At::shuffle);
  const unsigned other = (f.index & ~31u) + ((f.index & 31u) ^ static_cast<unsigned>(offset));
  std::memcpy(&x, &m.fibers[other].slots[turn], sizeof(x));
  return x;
}

inline unsigned __float_as_uint(float x) { return emulation::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits<double>(x); }

template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  emulation::Machine& m = emulation::machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, &args};
  m.arguments = &call;
  m.body = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    c.kernel(*c.args);
  };
  gridDim = config->gridDim;
  for (m.block.y = 0; m.block.y < gridDim.y; ++m.block.y) {
    for (m.block.x = 0; m.block.x < gridDim.x; ++m.block.x) emulation::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
