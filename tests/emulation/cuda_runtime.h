// What csrc/cuda/*.cu need of CUDA, on the CPU: found instead of the toolkit's header, it lets g++ compile the very same
// sources, so that the tests run the kernels' logic without a GPU.
//
// The threads of a block are fibers: each runs until it reaches a shuffle or a barrier, and goes on when the others of
// its warp, or of its block, are there too. What CUDA leaves undefined ends the process: a shuffle or a barrier that
// some threads never reach. densreg_reverse(1) runs the threads in the opposite order, which shows what depends on an
// order that CUDA does not promise.
//
// Blocks run one after the other, by their index. densreg_side_by_side(n) runs n at a time, the last first, each by a
// thread of the machine, and delays what one leaves for others; if all wait for blocks that have not started, the
// process ends. densreg_tickets(0) gives each block its index in place of a ticket.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a thread of the machine runs one block after the other

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
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

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

struct Options {
  bool reverse = false, tickets = true;
  int64_t lead = 0;  // of csrc/cuda/fronts.h
  int side_by_side = 1;
};
inline Options options;

// A launch: what the blocks that run side by side share.
struct Launch {
  std::mutex alone;  // one launch at a time
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::mutex mutex;
  std::condition_variable changed;
  int64_t left = 0;  // blocks that have not started
  uint64_t words = 0;  // that blocks have left for others
  int running = 0, waiting = 0;
  int64_t waits = 0;
};
inline Launch launch;

struct Machine {  // that runs a block
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t context;
  jmp_buf jump;
  dim3 block;
  uint64_t words = 0;  // of the launch when it last looked
};

inline Machine& machine() {
  static thread_local Machine one;
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
    launch.body(launch.arguments);
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
  for (unsigned i = 0; i < n; ++i) f(options.reverse ? n - 1 - i : i);
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

template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}

// Only a ticket is taken so.
inline unsigned atomicAdd(unsigned* p, unsigned x) {
  return emulation::options.tickets ? __atomic_fetch_add(p, x, __ATOMIC_RELAXED) : blockIdx.x;
}

// Only what others may wait for is left so.
template <class T>
void atomicExch(T* p, T x) {
  if (emulation::options.side_by_side > 1) std::this_thread::sleep_for(std::chrono::microseconds(200));
  const std::lock_guard<std::mutex> lock(emulation::launch.mutex);
  __atomic_store_n(p, x, __ATOMIC_RELEASE);
  ++emulation::launch.words;
  emulation::launch.waiting = 0;
  emulation::launch.changed.notify_all();
}

// Only who waits for others sleeps: until something has been left since it last looked.
inline void __nanosleep(unsigned) {
  emulation::Launch& l = emulation::launch;
  uint64_t& seen = emulation::machine().words;
  std::unique_lock<std::mutex> lock(l.mutex);
  if (seen == l.words) {
    ++l.waits;
    if (++l.waiting == l.running) emulation::fail("every block that runs waits for one that has not started");
    l.changed.wait(lock, [&] { return seen != l.words; });
  }
  seen = l.words;
}

namespace emulation {

// Runs blocks until all have started.
inline void run_blocks(dim3 grid, unsigned threads) {
  Machine& m = machine();
  std::unique_lock<std::mutex> lock(launch.mutex);
  while (launch.left > 0) {
    const int64_t blocks = int64_t{grid.x} * grid.y, left = launch.left--;
    const unsigned index = static_cast<unsigned>(options.side_by_side > 1 ? left - 1 : blocks - left);
    lock.unlock();
    m.block = dim3(index % grid.x, index / grid.x);
    run_block(threads);
    lock.lock();
  }
  if (--launch.running > 0 && launch.running == launch.waiting) fail("the last blocks wait for ever");
}

}  // namespace emulation

template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  emulation::Launch& l = emulation::launch;
  const std::lock_guard<std::mutex> alone(l.alone);
  struct Call {
    void (*kernel)(Args);
    const Args* args;
  } call{kernel, &args};
  l.arguments = &call;
  l.body = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    c.kernel(*c.args);
  };
  l.left = int64_t{config->gridDim.x} * config->gridDim.y;
  l.running = emulation::options.side_by_side;
  l.waiting = 0;
  const auto run = [&] { emulation::run_blocks(config->gridDim, config->blockDim.x); };
  std::vector<std::thread> others;
  for (int i = 1; i < emulation::options.side_by_side; ++i) others.emplace_back(run);
  run();
  for (std::thread& other : others) other.join();
  return cudaSuccess;
}
