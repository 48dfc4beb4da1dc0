#pragma once

namespace lmc {

// Centroids [rows, k], ascending, of the least weighted squared error for each row of x, w: [rows, n].
void optimal_clusters(const double* x, const double* w, int rows, int n, int k, double* centroids, int threads);

}  // namespace lmc
