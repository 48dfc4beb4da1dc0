// `lmc_attention`: rotary positions, the cache's update and scaled dot-product attention in one operation.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace lmc {
namespace {

constexpr int64_t kTokens = 32;      // of a block of queries
constexpr int64_t kLeastKeys = 128;  // of a split

ffi::Error bad(const std::string& what) { return ffi::Error::InvalidArgument("lmc_attention: " + what); }

struct Shape {
  int64_t batch, length, kv, group, head, slots;
};

// Attends over filled caches. `queries`: [batch, kv, length * group, head], turned and scaled.
void attend_all(const Kernels& k, ffi::ThreadPool& pool, int64_t threads, const Shape& s, const Cache& kc,
                const Cache& vc, const float* queries, const uint8_t* real, int64_t slot, float* out) {
  int64_t blocks = (s.length + kTokens - 1) / kTokens, heads = s.batch * s.kv;
  int64_t keys = slot + s.length;
  int64_t splits = 1;
  if (heads * blocks < 4 * threads && threads > 1)
    splits = std::max<int64_t>(1, std::min((keys + kLeastKeys - 1) / kLeastKeys, 4 * threads / (heads * blocks)));
  int64_t most = std::min(s.length, kTokens) * s.group, per_part = most * (s.head + 2);
  static thread_local Arena arena;
  float* parts = (float*)arena.get(heads * blocks * splits * per_part * 4 + 64);
  int64_t span = ((keys + splits - 1) / splits + 63) / 64 * 64;

  auto write = [&](int64_t b, int64_t h, int64_t block, int64_t first_part) {
    int64_t t0 = block * kTokens, rows = (std::min(s.length, t0 + kTokens) - t0) * s.group;
    for (int64_t r = 0; r < rows; r++) {
      float top = -INFINITY, total = 0;
      for (int64_t p = 0; p < splits; p++) top = std::max(top, parts[(first_part + p) * per_part + most * s.head + r]);
      int64_t t = t0 + r / s.group;
      float* to = out + ((b * s.length + t) * s.kv + h) * s.group * s.head + (r % s.group) * s.head;
      std::fill(to, to + s.head, 0.f);
      for (int64_t p = 0; p < splits; p++) {
        const float* part = parts + (first_part + p) * per_part;
        float maximum = part[most * s.head + r], sum = part[most * (s.head + 1) + r];
        float weight = maximum == -INFINITY ? 0.f : std::exp(maximum - top);
        total += sum * weight;
        const float* from = part + r * s.head;
        if (weight != 0.f)  // a NaN is not 0
          for (int64_t d = 0; d < s.head; d++) to[d] += from[d] * weight;
      }
      float inverse = total == 0.f ? 0.f : 1.f / total;
      for (int64_t d = 0; d < s.head; d++) to[d] *= inverse;
    }
  };

  parallel_for(pool, threads, heads * blocks * splits, [&](int64_t i) {
    static thread_local Arena scratch;
    int64_t p = i % splits, block = blocks - 1 - i / splits % blocks, bh = i / (splits * blocks);
    int64_t t0 = block * kTokens, t1 = std::min(s.length, t0 + kTokens), rows = (t1 - t0) * s.group;
    char* at = scratch.get(rows * 8 + 64 + k.attend_scratch(s.head, rows) * 4);
    int64_t* limit = (int64_t*)at;
    for (int64_t r = 0; r < rows; r++) limit[r] = slot + t0 + r / s.group + 1;
    float* part = parts + ((bh * blocks + block) * splits + p) * per_part;
    int64_t b = bh / s.kv, h = bh % s.kv;
    k.attend(kc, vc, s.head, bh * s.slots, p * span, std::min(keys, (p + 1) * span),
             queries + (bh * s.length + t0) * s.group * s.head, rows, limit, real + b * s.slots, part,
             part + most * s.head, part + most * (s.head + 1), (float*)(at + (rows * 8 + 63) / 64 * 64));
    if (splits == 1) write(b, h, block, bh * blocks + block);
  });
  if (splits > 1)
    for (int64_t i = 0; i < heads * blocks; i++) write(i / blocks / s.kv, i / blocks % s.kv, i % blocks, i * splits);
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer key, ffi::AnyBuffer value,
                     ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::AnyBuffer real, ffi::AnyBuffer slot_,
                     ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t head, float factor) {
  using D = ffi::DataType;
  const Kernels& k = kernels();
  for (auto& b : {q, key, value, cos, sin})
    if (b.element_type() != D::F32 || b.dimensions().size() != 3) return bad("q, k, v, cos and sin are float32 of rank 3");
  if (real.element_type() != D::PRED || real.dimensions().size() != 2) return bad("the mask is bool [batch, slots]");
  if (slot_.element_type() != D::S32 || slot_.element_count() != 1) return bad("the slot is one int32");
  Shape s;
  s.batch = q.dimensions()[0], s.length = q.dimensions()[1], s.head = head;
  int64_t slot = *(const int32_t*)slot_.untyped_data();
  if (head < 16 || head % 16) return bad("a head is a multiple of 16");
  s.kv = key.dimensions()[2] / head, s.slots = real.dimensions()[1];
  if (s.kv < 1 || q.dimensions()[2] % (s.kv * head) || key.dimensions()[2] % head) return bad("heads do not fit");
  s.group = q.dimensions()[2] / (s.kv * head);
  for (auto& b : {key, value, cos, sin})
    if (b.dimensions()[0] != s.batch || b.dimensions()[1] != s.length) return bad("batch or length differ");
  if (value.dimensions()[2] != key.dimensions()[2] || cos.dimensions()[2] != head / 2 || sin.dimensions()[2] != head / 2 ||
      real.dimensions()[0] != s.batch)
    return bad("v, cos, sin or the mask have another shape");
  if (args.size() + 1 != rets.size()) return bad("each buffer of a cache is returned");
  if (slot < 0 || slot + s.length > s.slots) return bad("the cache has " + std::to_string(s.slots) + " slots, " +
                                                        std::to_string(slot + s.length) + " are needed");
  auto y = rets.get<ffi::AnyBuffer>(0);
  if (!y.has_value() || (*y)->element_type() != D::F32 || (*y)->element_count() != q.element_count())
    return bad("the output is shaped as q");
  float* out = (float*)(*y)->untyped_data();
  int64_t entries = s.batch * s.kv * s.slots;
  if (q.element_count() == 0) return ffi::Error::Success();

  static thread_local Arena arena;
  int64_t query_bytes = int64_t(q.element_count()) * 4 + 64;
  Cache caches[2];
  char* at;
  if (args.size() == 0) {  // no cache: keys and values of these tokens alone
    if (slot != 0 || s.slots != s.length) return bad("without a cache the slots are the tokens");
    at = arena.get(query_bytes + 2 * entries * head * 4);
    for (int i = 0; i < 2; i++) caches[i].data = at + query_bytes + i * entries * head * 4;
  } else {
    at = arena.get(query_bytes);
    bool scaled = args.size() == 4;
    if (args.size() != 2 && !scaled) return bad("a cache is two buffers, or four with scales");
    for (size_t i = 0; i < args.size(); i++) {
      auto from = args.get<ffi::AnyBuffer>(i);
      auto to = rets.get<ffi::AnyBuffer>(i + 1);
      if (!from.has_value() || !to.has_value() || from->element_type() != (*to)->element_type() ||
          from->element_count() != (*to)->element_count())
        return bad("a buffer comes back as another");
      if (from->untyped_data() != (*to)->untyped_data()) std::memcpy((*to)->untyped_data(), from->untyped_data(), from->size_bytes());
      Cache& c = caches[i % 2];
      int64_t values = int64_t(from->element_count());
      if (i < 2) {
        D t = from->element_type();
        c.data = (*to)->untyped_data();
        c.type = t == D::F32 ? Type::f32 : t == D::BF16 ? Type::bf16 : t == D::S8 ? Type::u8 : Type::none;
        if (c.type == Type::none && t != D::U8) return bad("a cache holds float32, bfloat16, int8 or two 4-bit codes a byte");
        if (c.type == Type::none && head % 32) return bad("a head of 4-bit codes is a multiple of 32");
        if (values != entries * head / (c.type == Type::none ? 2 : 1)) return bad("a cache has another shape");
        if ((c.type == Type::u8 || c.type == Type::none) != scaled) return bad("codes go with scales, floats without");
      } else {
        c.scale = (float*)(*to)->untyped_data();
        if (from->element_type() != D::F32 || values != entries * (c.type == Type::none ? 2 : 1)) return bad("scales have another shape");
      }
    }
  }
  for (Cache& c : caches) c.slots = s.slots;

  float* queries = (float*)at;
  int64_t threads = threads_of(pool), tokens = s.batch * s.length, parts = tokens < 4 ? 1 : std::min(tokens, threads * 4);
  const float *Q = (const float*)q.untyped_data(), *K = (const float*)key.untyped_data(),
              *V = (const float*)value.untyped_data(), *C = (const float*)cos.untyped_data(),
              *S = (const float*)sin.untyped_data();
  parallel_for(pool, threads, parts, [&](int64_t part) {
    static thread_local Arena scratch;
    float* turned = (float*)scratch.get(head * 4 + 64);
    for (int64_t i = tokens * part / parts; i < tokens * (part + 1) / parts; i++) {
      int64_t b = i / s.length, t = i % s.length;
      const float *c = C + i * head / 2, *n = S + i * head / 2;
      for (int64_t h = 0; h < s.kv; h++) {
        int64_t row = (b * s.kv + h) * s.slots + slot + t;
        k.rotate(K + (i * s.kv + h) * head, c, n, 1.f, head, turned);
        k.append(caches[0], head, row, turned);
        k.append(caches[1], head, row, V + (i * s.kv + h) * head);
        for (int64_t g = 0; g < s.group; g++)
          k.rotate(Q + ((i * s.kv + h) * s.group + g) * head, c, n, factor, head,
                   queries + (((b * s.kv + h) * s.length + t) * s.group + g) * head);
      }
    }
  });
  attend_all(k, pool, threads, s, caches[0], caches[1], queries, (const uint8_t*)real.untyped_data(), slot, out);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lmc_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("head")
                                  .Attr<float>("factor"));

}  // namespace lmc
