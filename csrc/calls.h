// How often each operator was served by which kernels: for tests and benchmarks, through densreg_counter.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace densreg {

// One for each operator and kernel, at namespace scope: made when the library is loaded, by one thread.
class CallCounter {
 public:
  CallCounter(const std::string& op, const std::string& kernel) : name_(op + "/" + kernel), next_(first_) {
    first_ = this;
  }

  void add() { calls_.fetch_add(1, std::memory_order_relaxed); }

  // Name and calls of the counter of that index; null past the last.
  static const char* read(int index, int64_t* calls) {
    const CallCounter* counter = first_;
    while (counter && index-- > 0) counter = counter->next_;
    if (!counter) return nullptr;
    *calls = counter->calls_.load();
    return counter->name_.c_str();
  }

 private:
  std::string name_;
  std::atomic<int64_t> calls_{0};
  const CallCounter* next_;
  static inline const CallCounter* first_ = nullptr;
};

}  // namespace densreg
