// Runs the work sharing and the kernels from several callers at once, for ThreadSanitizer: `make native-tsan`.
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "../kernels.h"
#include "../parallel.h"

namespace {

class Pool {  // the interface of XLA's pool
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; i++) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    ready_.notify_all();
    for (auto& t : threads_) t.join();
  }
  template <class Work>
  void Schedule(Work&& work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.emplace_back(std::forward<Work>(work));
    }
    ready_.notify_one();
  }
  int64_t num_threads() const { return int64_t(threads_.size()); }

 private:
  void work() {
    for (;;) {
      std::function<void()> next;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return over_ || !queue_.empty(); });
        if (queue_.empty()) return;
        next = std::move(queue_.front());
        queue_.pop_front();
      }
      next();
    }
  }
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
  bool over_ = false;
};

// One int4 product of several rows, its tiles shared out; compared with the same done alone.
bool product(Pool& pool, const lmc::Kernels& k, int seed) {
  constexpr int64_t inputs = 256, outputs = 320, rows = 5;
  lmc::Weight w;
  w.codes = lmc::Codes::integer, w.bits = 4, w.inputs = inputs, w.outputs = outputs, w.blocks = inputs / 32;
  w.group = w.packed_group = 32, w.groups = inputs / 32, w.offset = 8;
  std::vector<uint8_t> codes(w.tiles() * w.blocks * 256);
  for (size_t i = 0; i < codes.size(); i++) codes[i] = uint8_t(i * 7 + seed);
  std::vector<float> scales(w.tiles() * w.groups * 16, 0.01f), x(rows * inputs), sums(rows * w.groups);
  for (size_t i = 0; i < x.size(); i++) x[i] = float((i * 13 + seed) % 17) - 8;
  w.data = codes.data(), w.scale = scales.data(), w.scale_type = lmc::Type::f32;
  std::vector<int8_t> q(x.size());
  std::vector<float> q_scale(rows * w.units());
  std::vector<int32_t> starts(rows * w.units());
  std::vector<float> found(rows * outputs), alone(rows * outputs);
  lmc::parallel_for(pool, lmc::threads_of(pool), rows, [&](int64_t r) {
    k.quantize_units(&x[r * inputs], inputs, 32, &q[r * inputs], &q_scale[r * w.units()], &starts[r * w.units()]);
    for (int64_t u = 0; u < w.units(); u++) starts[r * w.units() + u] *= -8;
    k.group_sums(&x[r * inputs], inputs, 32, &sums[r * w.groups]);
  });
  lmc::Rows in;
  in.count = rows, in.width = in.stride = inputs, in.x = x.data(), in.q = q.data(), in.scale = q_scale.data();
  in.starts = starts.data(), in.sums = sums.data();
  lmc::parallel_for(pool, lmc::threads_of(pool), w.tiles(),
                    [&](int64_t t) { k.few_int8(w, t, in, &found[16 * t], outputs); });
  for (int64_t t = 0; t < w.tiles(); t++) k.few_int8(w, t, in, &alone[16 * t], outputs);
  return found == alone;
}

}  // namespace

int main() {
  Pool pool(4);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; c++)
    callers.emplace_back([&, c] {
      for (int i = 0; i < 300; i++) wrong += !product(pool, lmc::portable_kernels(), 100 * c + i);
    });
  for (auto& t : callers) t.join();
  std::printf("%d products differ\n", wrong.load());
  return wrong != 0;
}
