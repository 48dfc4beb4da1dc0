// One-dimensional k-means by dynamic programming, exactly (Wang and Song 2011, Ckmeans.1d.dp): clusters are runs of the
// sorted values, and where the last run begins never falls, so each of k layers is solved by halving.
#include "kmeans.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

namespace lmc {
namespace {

struct Row {
  int n;
  std::vector<double> total, first, second;  // sums of the first i weights, weighted values and squares

  // Weighted squared error of one cluster of the values i to j - 1.
  double cost(int i, int j) const {
    const double w = total[j] - total[i], s = first[j] - first[i], q = second[j] - second[i];
    return w > 0 ? std::max(q - s * s / w, 0.0) : 0.0;
  }
};

void halve(const Row& row, const double* best, double* found, int32_t* start, int low, int high, int from, int to) {
  while (low <= high) {
    const int middle = low + (high - low) / 2;
    double least = std::numeric_limits<double>::infinity();
    int where = from;
    for (int i = from, end = std::min(middle, to); i <= end; ++i) {
      const double value = best[i] + row.cost(i, middle);
      if (value < least) least = value, where = i;
    }
    found[middle] = least;
    start[middle] = where;
    halve(row, best, found, start, low, middle - 1, from, where);
    low = middle + 1;
    from = where;
  }
}

void solve(const double* x, const double* w, int n, int k, double* centroids) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return x[a] < x[b]; });
  double centre = 0, mean = 0;
  for (int i = 0; i < n; ++i) centre += x[i], mean += w[i];
  centre /= n;
  mean /= n;
  const double least = 1e-12 * mean + 1e-300;  // a value without weight has a place, and costs next to nothing
  Row row{n, std::vector<double>(n + 1), std::vector<double>(n + 1), std::vector<double>(n + 1)};
  for (int i = 0; i < n; ++i) {
    const double v = x[order[i]] - centre, u = std::max(w[order[i]], least);
    row.total[i + 1] = row.total[i] + u;
    row.first[i + 1] = row.first[i] + u * v;
    row.second[i + 1] = row.second[i] + u * v * v;
  }
  std::vector<double> best(n + 1), next(n + 1);
  std::vector<int32_t> starts(static_cast<size_t>(k) * (n + 1));
  for (int j = 0; j <= n; ++j) best[j] = row.cost(0, j);
  for (int layer = 1; layer < k; ++layer) {
    halve(row, best.data(), next.data(), starts.data() + static_cast<size_t>(layer) * (n + 1), 0, n, 0, n);
    best.swap(next);
  }
  int end = n;
  double last = std::numeric_limits<double>::quiet_NaN();
  for (int layer = k - 1; layer >= 0; --layer) {  // runs without values stand where the one after them does
    const int begin = layer ? starts[static_cast<size_t>(layer) * (n + 1) + end] : 0;
    if (end > begin) last = (row.first[end] - row.first[begin]) / (row.total[end] - row.total[begin]) + centre;
    centroids[layer] = last;
    end = begin;
  }
  for (int c = 1; c < k; ++c)
    if (centroids[c] != centroids[c]) centroids[c] = centroids[c - 1];
  for (int c = k - 2; c >= 0; --c)
    if (centroids[c] != centroids[c]) centroids[c] = centroids[c + 1];
  std::sort(centroids, centroids + k);
}

}  // namespace

void optimal_clusters(const double* x, const double* w, int rows, int n, int k, double* centroids, int threads) {
  auto work = [&](int first) {
    for (int r = first; r < rows; r += threads)
      solve(x + static_cast<size_t>(r) * n, w + static_cast<size_t>(r) * n, n, k, centroids + static_cast<size_t>(r) * k);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (auto& other : others) other.join();
}

}  // namespace lmc
