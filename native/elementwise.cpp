// `lmc_rms_norm`, `lmc_gated_silu`, `lmc_argmax`: what stands around products; `lmc_sparse_linear`: a dense product that
// skips zero inputs; `lmc_read`: the memory's speed, for benchmarks.
#include <atomic>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace lmc {
namespace {

constexpr int64_t kShare = 1 << 12;  // values from which work is shared out

template <class Task>
void over_rows(ffi::ThreadPool& pool, int64_t rows, int64_t width, Task task) {
  int64_t threads = threads_of(pool), parts = rows * width < kShare ? 1 : std::min(rows, threads * 4);
  parallel_for(pool, threads, parts, [&](int64_t p) { task(rows * p / parts, rows * (p + 1) / parts); });
}

ffi::Error rms_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale,
                    ffi::ResultBuffer<ffi::F32> y, float epsilon) {
  auto dims = x.dimensions();
  int64_t width = dims.size() ? dims.back() : 0, rows = width ? int64_t(x.element_count()) / width : 0;
  int64_t scales = width ? int64_t(scale.element_count()) / width : 0;  // more than one under vmap
  if (!dims.size() || y->element_count() != x.element_count() || int64_t(scale.element_count()) != scales * width ||
      (rows && (!scales || rows % scales)))
    return ffi::Error::InvalidArgument("lmc_rms_norm: shapes differ");
  const Kernels& k = kernels();
  over_rows(pool, rows, width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++)
      k.rms_norm(x.typed_data() + r * width, scale.typed_data() + r / (rows / scales) * width, epsilon, width, y->typed_data() + r * width);
  });
  return ffi::Error::Success();
}

ffi::Error gated_silu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up,
                      ffi::ResultBuffer<ffi::F32> y) {
  int64_t n = int64_t(gate.element_count());
  if (up.element_count() != size_t(n) || y->element_count() != size_t(n))
    return ffi::Error::InvalidArgument("lmc_gated_silu: shapes differ");
  const Kernels& k = kernels();
  over_rows(pool, (n + 1023) / 1024, 1024, [&](int64_t first, int64_t last) {
    int64_t from = first * 1024, to = std::min(n, last * 1024);
    if (from < to) k.gated_silu(gate.typed_data() + from, up.typed_data() + from, to - from, y->typed_data() + from);
  });
  return ffi::Error::Success();
}

ffi::Error argmax(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::S32> y) {
  auto dims = x.dimensions();
  int64_t width = dims.size() ? dims.back() : 0, rows = width ? int64_t(x.element_count()) / width : 0;
  if (!width || int64_t(y->element_count()) != rows) return ffi::Error::InvalidArgument("lmc_argmax: shapes differ");
  const Kernels& k = kernels();
  over_rows(pool, rows, width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) y->typed_data()[r] = int32_t(k.argmax(x.typed_data() + r * width, width));
  });
  return ffi::Error::Success();
}

ffi::Error read(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::ResultBuffer<ffi::U32> y) {
  if (y->element_count() != 2) return ffi::Error::InvalidArgument("lmc_read: the output is uint32 [2]");
  int64_t words = int64_t(x.size_bytes()) / 8, threads = threads_of(pool), parts = threads * 16;
  const uint64_t* from = (const uint64_t*)x.untyped_data();
  std::atomic<uint64_t> total{0};
  parallel_for(pool, threads, parts, [&](int64_t p) {
    typedef uint64_t u64x8 __attribute__((vector_size(64), aligned(8), may_alias));
    u64x8 sums[4] = {};
    int64_t i = words * p / parts, end = words * (p + 1) / parts;
    for (; i + 32 <= end; i += 32)
      for (int j = 0; j < 4; j++) sums[j] ^= *(const u64x8*)(from + i + 8 * j);
    uint64_t found = 0;
    for (auto& s : sums)
      for (int j = 0; j < 8; j++) found ^= s[j];
    for (; i < end; i++) found ^= from[i];
    total.fetch_xor(found);
  });
  uint64_t found = total;
  y->typed_data()[0] = uint32_t(found), y->typed_data()[1] = uint32_t(found >> 32);
  return ffi::Error::Success();
}

ffi::Error sparse_linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                         ffi::ResultBuffer<ffi::F32> y) {
  auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 2 || ys.size() != 2 || xs[1] != ws[0] || ys[0] != xs[0] || ys[1] != ws[1])
    return ffi::Error::InvalidArgument("lmc_sparse_linear: x [rows, in], w [in, out] and y [rows, out] are needed");
  int64_t rows = xs[0], inputs = ws[0], outputs = ws[1];
  int64_t threads = threads_of(pool), tile = std::max<int64_t>(64, (outputs / threads + 15) / 16 * 16);
  int64_t tiles = (outputs + tile - 1) / tile;
  const Kernels& k = kernels();
  parallel_for(pool, rows * inputs * outputs < kShare ? 1 : threads, rows * tiles, [&](int64_t p) {
    int64_t r = p / tiles, from = p % tiles * tile;
    k.sparse_row(x.typed_data() + r * inputs, w.typed_data() + from, inputs, outputs, std::min(tile, outputs - from),
                 y->typed_data() + r * outputs + from);
  });
  return ffi::Error::Success();
}
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lmc_rms_norm, rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(lmc_gated_silu, gated_silu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lmc_argmax, argmax,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(lmc_sparse_linear, sparse_linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(lmc_read, read,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::U32>>());

}  // namespace lmc
