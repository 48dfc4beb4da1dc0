// The Python module: handlers as capsules, and which instruction set was chosen.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdlib>
#include <string>

#include "kernels.h"
#include "kmeans.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

namespace lmc {

// The best that this CPU runs. LMCOMPRESS_ISA asks for a lesser one; a greater one than the CPU has is not given.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* text = std::getenv("LMCOMPRESS_ISA");
    std::string most = text ? text : "";
    if (most == "portable") return portable_kernels();
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
                  __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    if (avx512 && most != "avx2") return avx512_kernels();
    if (avx2) return avx2_kernels();
#endif
    return portable_kernels();
  }();
  return chosen;
}

XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_linear);
XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_embed);
XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_attention);
XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_rms_norm);
XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_gated_silu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_argmax);
XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_sparse_linear);
XLA_FFI_DECLARE_HANDLER_SYMBOL(lmc_read);
}  // namespace lmc

using Matrix = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

NB_MODULE(_native, m) {
  m.def("isa", [] { return lmc::kernels().name; }, "The instruction set whose kernels run.");
  m.def(
      "optimal_clusters",
      [](Matrix x, Matrix weights, Output centroids, int threads) {
        const int rows = static_cast<int>(x.shape(0)), n = static_cast<int>(x.shape(1));
        const bool fits = weights.shape(0) == x.shape(0) && weights.shape(1) == x.shape(1) &&
                          centroids.shape(0) == x.shape(0) && n > 0 && centroids.shape(1) > 0;
        if (!fits) throw nb::value_error("x and weights are [rows, n], centroids [rows, k]");
        nb::gil_scoped_release release;
        lmc::optimal_clusters(x.data(), weights.data(), rows, n, static_cast<int>(centroids.shape(1)),
                              centroids.data(), threads < 1 ? 1 : threads);
      },
      nb::arg("x"), nb::arg("weights"), nb::arg("centroids"), nb::arg("threads"),
      "Fills centroids [rows, k] with the optimal ones of each row of x [rows, n], all float64.");
  m.def(
      "handlers",
      [] {
        nb::dict found;
        auto add = [&](const char* name, XLA_FFI_Handler* handler) {
          found[name] = nb::capsule(reinterpret_cast<void*>(handler));
        };
        add("lmc_linear", lmc::lmc_linear);
        add("lmc_embed", lmc::lmc_embed);
        add("lmc_attention", lmc::lmc_attention);
        add("lmc_rms_norm", lmc::lmc_rms_norm);
        add("lmc_gated_silu", lmc::lmc_gated_silu);
        add("lmc_argmax", lmc::lmc_argmax);
        add("lmc_sparse_linear", lmc::lmc_sparse_linear);
        add("lmc_read", lmc::lmc_read);
        return found;
      },
      "Handlers by the name that they are registered under.");
}
