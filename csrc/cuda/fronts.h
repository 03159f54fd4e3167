// Rows longer than a tile, in one launch. A row is split into chunks. An item of work is a chunk that is reduced to a
// few numbers, or one that is written with the numbers of all chunks of its row. Two fronts of items go through the
// rows, and the one that reduces keeps so far ahead that the other finds its numbers there, and so near that the second
// read of a chunk comes from the L2.
//
// A block takes a ticket, in whatever order blocks start. An item that writes waits only for tickets drawn before its
// own, of items that wait for none: so no order of blocks hangs. What is summed over the chunks of a row is summed in
// the order of the chunks, whichever came first.
#pragma once

#include "launch.h"

namespace densreg::cuda {

// A number that one block leaves to others is its own flag: a word of the number's size, which is written and read as a
// whole. Its bits are those of the number, less those of a NaN that no operation gives (it is a signalling one): zero,
// with which the memory begins, is no number.
template <class A>
using Word = std::conditional_t<std::is_same_v<A, double>, unsigned long long, unsigned>;

DENSREG_DEVICE unsigned word_of(float x) {
  return __float_as_uint(x == x ? x : std::numeric_limits<float>::quiet_NaN()) ^ 0x7fa5a5a5u;
}
DENSREG_DEVICE unsigned long long word_of(double x) {
  const double given = x == x ? x : std::numeric_limits<double>::quiet_NaN();
  return static_cast<unsigned long long>(__double_as_longlong(given)) ^ 0x7ff4a5a5a5a5a5a5ull;
}
DENSREG_DEVICE float number_of(unsigned word) { return __uint_as_float(word ^ 0x7fa5a5a5u); }
DENSREG_DEVICE double number_of(unsigned long long word) {
  return __longlong_as_double(static_cast<long long>(word ^ 0x7ff4a5a5a5a5a5a5ull));
}

struct Item {
  int64_t row, chunk;
  bool writes;
};

template <class A>
struct Fronts {
  Split split;
  unsigned reduces;  // items that reduce
  unsigned ahead;    // of them before the first that writes
  unsigned writes;   // items of a row that write: each of its chunks, or one
  unsigned* ticket;  // null if there is nothing to reduce
  Word<A>* words;    // [numbers, reduces]

  // The item of this block. All of its threads call it.
  DENSREG_DEVICE Item take() const {
    if (!ticket) return item(blockIdx.x, true);
    __shared__ unsigned drawn;
    if (threadIdx.x == 0) drawn = atomicAdd(ticket, 1u);
    __syncthreads();
    if (drawn < ahead) return item(drawn, false);
    const unsigned since = drawn - ahead;
    if (since >= 2 * (reduces - ahead)) return item(drawn - reduces, true);  // nothing is left to reduce
    return since % 2 ? item(since / 2, true) : item(ahead + since / 2, false);
  }

  DENSREG_DEVICE void publish(const Item& item, int number, A x) const {
    atomicExch(words + int64_t{reduces} * number + item.row * split.chunks + item.chunk, word_of(x));
  }

  // The first `numbers` of what a chunk leaves, once they are there.
  template <int N>
  DENSREG_DEVICE void wait(int64_t row, int64_t chunk, int numbers, A (&x)[N]) const {
    const volatile Word<A>* at = words + row * split.chunks + chunk;
    for (bool all = false; !all;) {
      all = true;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i >= numbers) continue;
        const Word<A> word = at[int64_t{reduces} * i];
        x[i] = number_of(word);
        all = all && word != 0;
      }
      if (!all) __nanosleep(32);
    }
  }

 private:
  DENSREG_DEVICE Item item(unsigned index, bool writing) const {
    const unsigned of_row = writing ? writes : static_cast<unsigned>(split.chunks);
    return {index / of_row, index % of_row, writing};
  }
};

// Blocks a multiprocessor that registers must suffice for. Left to itself, the assembler gives float64 so few registers
// that they spill.
template <class Raw>
inline constexpr int kResident = std::is_same_v<Raw, double> ? 1 : 4;

// How many chunks of a row each of T threads waits for.
template <int T>
inline constexpr int kWaits = static_cast<int>((kMaxChunks + T - 1) / T);

// Launches a kernel over rows of n elements (of ROWS tensors), of whose chunks so many `numbers` are left, or none;
// then all chunks are written, or with `whole` each row by one block. `args.fronts` is set here.
template <int T, class Raw, int ROWS, class Args>
void launch_fronts(const OnDevice& device, void (*kernel)(Args), const Tensor& like, int64_t rows, int64_t n,
                   int numbers, bool whole, Args args) {
  using A = Acc<Raw>;
  auto& fronts = args.fronts;
  fronts = {split_of<Raw, ROWS>(n)};
  const int64_t chunks = fronts.split.chunks, reduces = numbers ? rows * chunks : 0, writes = whole ? 1 : chunks;
  fronts.reduces = static_cast<unsigned>(reduces);
  fronts.writes = static_cast<unsigned>(writes);
  // With the whole row in one item nothing is read again: then all are reduced first.
  fronts.ahead = static_cast<unsigned>(whole ? reduces : std::min(reduces, chunks + device.lead()));
  std::optional<Tensor> memory;  // of this call alone: graphs that are replayed side by side could not share any
  if (numbers) {
    constexpr int64_t kTicket = 128 / sizeof(A);  // a cache line of its own
    const int64_t words = kTicket + numbers * reduces;
    memory = empty<1>(like, {words}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
    device.zero(memory->data_ptr(), static_cast<size_t>(words) * sizeof(A));
    fronts.ticket = data<unsigned>(*memory);
    fronts.words = data<Word<A>>(*memory) + kTicket;
  }
  device.launch<T>(kernel, reduces + rows * writes, args);
}

}  // namespace densreg::cuda
