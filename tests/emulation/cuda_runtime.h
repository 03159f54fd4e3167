// What csrc/cuda/*.cu need of CUDA, on the CPU: found instead of the toolkit's header, it lets g++ compile the very same
// sources, so that the tests run the kernels' logic without a GPU.
//
// The threads of a block are fibers: each runs until it reaches a shuffle or a barrier, and goes on when the others of
// its warp, or of its block, are there too; so do the blocks of a cluster. What CUDA leaves undefined ends the process: a
// shuffle or a barrier that some threads never reach. DENSREG_EMULATION_ORDER=reverse runs the threads in the opposite
// order, which shows what depends on an order that CUDA does not promise; DENSREG_EMULATION_CAPABILITY=8 is a GPU that
// has no clusters.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other: those of a cluster from one of its barriers to the next

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* major = std::getenv("DENSREG_EMULATION_CAPABILITY");
  *value = major ? std::atoi(major) : 9;
  return cudaSuccess;
}
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

enum class At { running, shuffle, barrier, cluster, end };

struct Fiber {
  static constexpr size_t kStack = 256 * 1024;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf jump;
  bool entered = false;
  At at = At::running;
  unsigned index = 0;     // in its block
  unsigned first = 0;     // where its block's fibers begin
  unsigned block = 0;
  int offset = 0;         // of the shuffle it waits at
  uint64_t slots[2] = {};  // what it gives in a shuffle; in turn, as a fast neighbour may be one shuffle ahead
  unsigned shuffles = 0;
};

struct Machine {
  std::mutex mutex;
  std::deque<Fiber> fibers;  // contexts must not move
  Fiber* current = nullptr;
  ucontext_t context;
  jmp_buf jump;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  const bool reverse = std::getenv("DENSREG_EMULATION_ORDER") != nullptr;
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
inline At run_warp(unsigned first) {
  auto& fibers = machine().fibers;
  const Fiber& one = fibers[first];
  for (;;) {
    in_order(32, [&](unsigned i) { resume(fibers[first + i]); });
    for (unsigned i = 1; i < 32; ++i) {
      const Fiber& other = fibers[first + i];
      if (other.at != one.at) fail("a shuffle or a barrier that part of a warp does not reach");
      if (one.at == At::shuffle && other.offset != one.offset) fail("two different shuffles in a warp");
    }
    if (one.at != At::shuffle) return one.at;
  }
}

// Runs n parts (warps, blocks) until all of them wait at the same place.
template <class F>
At run_all(unsigned n, F part) {
  std::vector<At> at(n);
  in_order(n, [&](unsigned i) { at[i] = part(i); });
  for (const At one : at) {
    if (one != at[0]) fail("a barrier that part of a block or a cluster does not reach");
  }
  return at[0];
}

// Runs a block until all of it waits at a barrier of its cluster, or has ended.
inline At run_block(unsigned first, unsigned threads) {
  for (;;) {
    const At at = run_all(threads / 32, [&](unsigned w) { return run_warp(first + w * 32); });
    if (at != At::barrier) return at;
  }
}

inline void run_cluster(unsigned block, unsigned blocks, unsigned threads) {
  Machine& m = machine();
  if (threads == 0 || threads % 32 || threads > 1024) fail("a block that is not of 1 to 32 warps");
  if (blocks > 8) fail("a cluster of more than 8 blocks");
  while (m.fibers.size() < static_cast<size_t>(blocks) * threads) {
    Fiber& f = m.fibers.emplace_back();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = Fiber::kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, life, 0);
  }
  for (unsigned i = 0; i < blocks * threads; ++i) {
    Fiber& f = m.fibers[i];
    f.index = i % threads;
    f.first = i - f.index;
    f.block = block + i / threads;
  }
  while (run_all(blocks, [&](unsigned b) { return run_block(b * threads, threads); }) != At::end) continue;
}

struct Index {
  unsigned x;
};

}  // namespace emulation

#define threadIdx (emulation::Index{emulation::machine().current->index})
#define blockIdx (emulation::Index{emulation::machine().current->block})
inline emulation::Index gridDim;

inline void __syncthreads() { emulation::wait(emulation::At::barrier); }
#define DENSREG_CLUSTER_BARRIER() emulation::wait(emulation::At::cluster)

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
  std::memcpy(&x, &m.fibers[f.first + other].slots[turn], sizeof(x));
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
  gridDim.x = config->gridDim.x;
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  if (gridDim.x % cluster) emulation::fail("a grid that is not of whole clusters");
  for (unsigned block = 0; block < gridDim.x; block += cluster) {
    emulation::run_cluster(block, cluster, config->blockDim.x);
  }
  return cudaSuccess;
}
