// Work shared between the calling thread and a pool: XLA's, or another with `Schedule` and `num_threads`.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

namespace lmc {

inline void breathe() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How many threads work on one operation: the pool's (which follows the affinity mask), at most LMCOMPRESS_THREADS.
template <class Pool>
int64_t threads_of(Pool& pool) {
  static const int64_t most = [] {
    const char* text = std::getenv("LMCOMPRESS_THREADS");
    return text ? std::max<int64_t>(1, std::atoll(text)) : int64_t{1} << 20;
  }();
  return std::max<int64_t>(1, std::min(most, pool.num_threads()));
}

// Calls task(i) for each i in [0, count), in any order. The caller takes part, so that it works with no free thread
// in the pool; helpers that come late find nothing left. A helper that has taken an index finishes it before the
// caller returns, so `task` may refer to the caller's stack; the counters outlive both.
template <class Pool, class Task>
void parallel_for(Pool& pool, int64_t threads, int64_t count, Task&& task) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  struct alignas(64) Shared {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto* work = &task;
  auto drain = [shared, work, count] {
    int64_t finished = 0;
    for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < count; finished++) (*work)(i);
    if (finished) shared->done.fetch_add(finished, std::memory_order_release);
  };
  for (int64_t t = 1; t < std::min(threads, count); t++) {
    auto helper = drain;
    pool.Schedule(std::move(helper));
  }
  drain();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; spins++)
    spins < 1 << 14 ? breathe() : std::this_thread::yield();
}

// Bytes that a thread reuses from call to call, aligned to 64; what was there is lost.
class Arena {
 public:
  char* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
    }
    return data_;
  }
  Arena() = default;
  Arena(Arena&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Arena& operator=(Arena&&) = delete;
  ~Arena() { std::free(data_); }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace lmc
