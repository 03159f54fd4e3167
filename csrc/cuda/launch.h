// From an operator's arguments to a kernel: storage type, tile configuration, device, stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/Exception.h>

#include "../arguments.h"
#include "../calls.h"
#include "row.h"

// Weak: a torch without CUDA has no such function, and loads the library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace densreg::cuda {

// A tile is what a thread group (row.h) holds in registers of one row.
struct TileConfig {
  int threads;  // of the group
  int numbers;  // that each of them holds, or fewer: vectors_of
};

// The first configuration whose tile holds a whole row is taken. Small groups keep all lanes busy at C = 10 to 100 and
// need no barrier. Beyond, there is one for every doubling, so that at most half of a group idles, of 8 to 16 numbers a
// thread, as in kernels/rows.py: Triton reached 0.6 to 1.0 of an H200's copy speed with them at C = 4096, where larger
// steps reached 0.2 to 0.7. Not measured with these kernels.
#ifdef DENSREG_CUDA_TILES  // the tests' emulation, to reach every configuration with small rows
inline constexpr TileConfig kTileConfigs[] = DENSREG_CUDA_TILES;
inline constexpr TileConfig kSplit = DENSREG_CUDA_SPLIT;
inline constexpr int64_t kMaxChunks = DENSREG_CUDA_MAX_CHUNKS;
#else
inline constexpr TileConfig kTileConfigs[] = {{4, 4},    {16, 4},   {32, 8},   {32, 16},  {128, 8},
                                              {128, 16}, {256, 16}, {512, 16}, {1024, 16}};
// Longer rows: chunks of one block each, of the same size on every GPU, so that a row's sums are the same everywhere.
inline constexpr TileConfig kSplit = {256, 32};
// A row of more chunks has longer ones: each block that writes reads what all of them found.
inline constexpr int64_t kMaxChunks = 512;
#endif
static_assert(kSplit.threads > 32, "a chunk is the work of a block");

// Vectors that a thread holds of each row, in a kernel that holds ROWS of them at once: as many numbers, of all rows
// together, as the configuration says; in float64, whose functions need the most registers, a quarter.
template <class Raw, int ROWS>
constexpr int vectors_of(TileConfig config) {
  constexpr int share = std::is_same_v<Raw, double> ? 4 : 1;
  // Up to 16 the number is meant for each row.
  const int numbers = config.numbers <= 16 ? config.numbers : config.numbers / ROWS;
  return std::max(1, numbers / share / kLanes<Raw>);
}

// Calls f(threads, vectors), compile-time numbers, with the first configuration whose tile holds a row of n elements;
// false if none does. Rows that are not `aligned` begin anywhere: up to N - 1 elements of their first vector are before
// them.
template <class Raw, int ROWS, size_t CONFIGS = std::size(kTileConfigs), size_t I = 0, class F>
bool with_tile_config(int64_t n, bool aligned, F f) {
  if constexpr (I == CONFIGS) {
    return false;
  } else {
    constexpr int threads = kTileConfigs[I].threads, vectors = vectors_of<Raw, ROWS>(kTileConfigs[I]);
    if (n + (aligned ? 0 : kLanes<Raw> - 1) <= static_cast<int64_t>(threads) * vectors * kLanes<Raw>) {
      f(std::integral_constant<int, threads>{}, std::integral_constant<int, vectors>{});
      return true;
    }
    return with_tile_config<Raw, ROWS, CONFIGS, I + 1>(n, aligned, f);
  }
}

// Whether every row begins where a vector does.
template <class Raw>
bool is_aligned(const Raw* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kLanes<Raw> == 0;
}

// Chunks of the same size, of ROWS rows at once. Each is one tile of a kernel that holds them (unless there are more
// than kMaxChunks), wherever a row begins: with the elements before it a chunk of a whole tile would be two of them,
// the second all but empty.
template <class Raw, int ROWS>
Split split_of(int64_t n) {
  constexpr int64_t N = kLanes<Raw>;
  constexpr int64_t most = (static_cast<int64_t>(kSplit.threads) * vectors_of<Raw, ROWS>(kSplit) - 1) * N;
  const int64_t least = std::clamp<int64_t>((n + most - 1) / most, 1, kMaxChunks);
  const int64_t size = std::max<int64_t>(1, ((n + least - 1) / least + N - 1) / N) * N;  // each begins as the row does
  STD_TORCH_CHECK(size <= 0x40000000, "densreg: a row of ", n, " elements is longer than the kernels go");
  return {std::max<int64_t>(1, (n + size - 1) / size), size};
}

// The device of a tensor made current, and its current stream: what an operator does happens there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()), index_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "densreg: CUDA tensors in a torch without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // One group of T threads for every row, or for every chunk of every row. Nothing waits for it.
  template <int T, class Args>
  void launch(void (*kernel)(Args), int64_t rows, const Args& args, int64_t chunks = 1) const {
    const int64_t blocks = (rows + Group<T>::kGroups - 1) / Group<T>::kGroups;
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7fffffff, "densreg: ", blocks, " blocks are more than CUDA has");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(chunks));
    config.blockDim = dim3(Group<T>::kThreads);
    config.stream = stream_;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
    STD_TORCH_CHECK(error == cudaSuccess, "densreg: the kernel was not launched: ", cudaGetErrorString(error));
  }

  // How far beyond a row the reducing front is ahead (fronts.h): what a GPU has under way at once, and some.
  int64_t lead() const {
#ifdef DENSREG_CUDA_LEAD  // the tests' emulation
    return DENSREG_CUDA_LEAD;
#else
    static std::array<std::atomic<int>, 64> known;  // of each device, 0: not yet
    auto& multiprocessors = known[static_cast<size_t>(index_) % known.size()];
    if (multiprocessors == 0) {
      int count = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_);
      STD_TORCH_CHECK(error == cudaSuccess, "densreg: ", cudaGetErrorString(error));
      multiprocessors = count;
    }
    return 3 * multiprocessors + 64;
#endif
  }

  void zero(void* memory, size_t bytes) const {
    const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, stream_);
    STD_TORCH_CHECK(error == cudaSuccess, "densreg: memory was not set: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
  cudaStream_t stream_;
};

// Calls f with a value of the storage type of a dtype.
template <class F>
void for_dtype(ScalarType dtype, const char* op, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "densreg::", op, ": expected float16, bfloat16, float32 or float64");
  }
}

// A fresh contiguous tensor on the device of another, from torch's allocator.
template <size_t N>
Tensor empty(const Tensor& like, const std::array<int64_t, N>& sizes, ScalarType dtype) {
  std::array<int64_t, N> strides;
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  const int32_t type = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Double   ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(N), sizes.data(), strides.data(), type,
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_rows(const char* op, const char* what, const std::optional<Tensor>& t, const Tensor& like) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == like.size(0) && same_device(*t, like), "densreg::", op, ": ", what,
                  " must be a tensor of shape [", like.size(0), "] on the device of the other arguments");
}

template <class A, class T>
A* data(const T& t) {
  return static_cast<A*>(t.data_ptr());
}

}  // namespace densreg::cuda
