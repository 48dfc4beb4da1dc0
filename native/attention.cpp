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
  int64_t row;  // tokens of a row of the output, of which `length` are attended from here on
};

// Slots [first, last) of a pair of caches; slot s of a head is entry head * stride + shift + s.
struct Region {
  const Cache *k, *v;
  int64_t stride, shift, first, last;
};

// Attends over the regions of filled caches. `queries`: [batch, kv, length * group, head], turned and scaled.
void attend_all(const Kernels& k, ffi::ThreadPool& pool, int64_t threads, const Shape& s,
                const std::vector<Region>& regions, const float* queries, const uint8_t* real, int64_t slot, float* out) {
  int64_t blocks = (s.length + kTokens - 1) / kTokens, heads = s.batch * s.kv, splits = int64_t(regions.size());
  int64_t most = std::min(s.length, kTokens) * s.group, per_part = most * (s.head + 2);
  static thread_local Arena arena;
  float* parts = (float*)arena.get(heads * blocks * splits * per_part * 4 + 64);

  auto write = [&](int64_t b, int64_t h, int64_t block, int64_t first_part) {
    int64_t t0 = block * kTokens, rows = (std::min(s.length, t0 + kTokens) - t0) * s.group;
    for (int64_t r = 0; r < rows; r++) {
      float top = -INFINITY, total = 0;
      for (int64_t p = 0; p < splits; p++) top = std::max(top, parts[(first_part + p) * per_part + most * s.head + r]);
      int64_t t = t0 + r / s.group;
      float* to = out + ((b * s.row + t) * s.kv + h) * s.group * s.head + (r % s.group) * s.head;
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
    const Region& region = regions[p];
    k.attend(*region.k, *region.v, s.head, bh * region.stride + region.shift, region.first, region.last,
             queries + (bh * s.length + t0) * s.group * s.head, rows, limit, real + b * s.slots, part,
             part + most * s.head, part + most * (s.head + 1), (float*)(at + (rows * 8 + 63) / 64 * 64));
    if (splits == 1) write(b, h, block, bh * blocks + block);
  });
  if (splits > 1)
    for (int64_t i = 0; i < heads * blocks; i++) write(i / blocks / s.kv, i / blocks % s.kv, i % blocks, i * splits);
}

// Cuts slots [0, keys) of a region so that there is work for every thread.
void split(std::vector<Region>& regions, Region whole, const Shape& s, int64_t threads) {
  int64_t blocks = (s.length + kTokens - 1) / kTokens, heads = s.batch * s.kv, keys = whole.last, splits = 1;
  if (heads * blocks < 4 * threads && threads > 1)
    splits = std::max<int64_t>(1, std::min((keys + kLeastKeys - 1) / kLeastKeys, 4 * threads / (heads * blocks)));
  int64_t span = ((keys + splits - 1) / splits + 63) / 64 * 64;
  for (int64_t p = 0; p < splits; p++) {
    whole.first = p * span, whole.last = std::min(keys, (p + 1) * span);
    regions.push_back(whole);
  }
}

// Codes of all but the recent tokens, and a ring of those as they are: slot s of the ring is entry s % `ring`.
// A token at slot t sees codes below max(0, t / group * group - window) and the ring from there on.
struct Window {
  Cache k, v;         // codes
  Cache recent[2];    // keys and values of the ring
  int64_t ring = 0, group = 0;
  int64_t kept() const { return ring - 2 * group; }
  int64_t coded(int64_t t) const { return std::max<int64_t>(0, t / group * group - kept()); }
};

struct Inputs {
  const float *q, *k, *v, *cos, *sin;
  const uint8_t* real;
  float factor;
};

// Turns tokens [t0, t0 + length) of each row: `place(b, h, t, key, value)` takes a key and a value, queries go to
// [batch, kv, length, group, head].
template <class Place>
void turn(const Kernels& k, ffi::ThreadPool& pool, int64_t threads, const Shape& s, const Inputs& in, int64_t t0,
          float* queries, Place place) {
  int64_t tokens = s.batch * s.length, parts = tokens < 4 ? 1 : std::min(tokens, threads * 4), head = s.head;
  parallel_for(pool, threads, parts, [&](int64_t part) {
    static thread_local Arena scratch;
    float* turned = (float*)scratch.get(head * 4 + 64);
    for (int64_t i = tokens * part / parts; i < tokens * (part + 1) / parts; i++) {
      int64_t b = i / s.length, t = i % s.length, at = b * s.row + t0 + t;
      const float *c = in.cos + at * head / 2, *n = in.sin + at * head / 2;
      for (int64_t h = 0; h < s.kv; h++) {
        k.rotate(in.k + (at * s.kv + h) * head, c, n, 1.f, head, turned);
        place(b, h, t0 + t, turned, in.v + (at * s.kv + h) * head);
        for (int64_t g = 0; g < s.group; g++)
          k.rotate(in.q + ((at * s.kv + h) * s.group + g) * head, c, n, in.factor, head,
                   queries + (((b * s.kv + h) * s.length + t) * s.group + g) * head);
      }
    }
  });
}

// Reads `s.row` tokens into a windowed cache, up to a group's end at a time: all of those see the same codes.
void windowed(const Kernels& k, ffi::ThreadPool& pool, int64_t threads, Shape s, const Inputs& in, const Window& w,
              int64_t slot, float* queries, float* out) {
  int64_t head = s.head;
  for (int64_t t0 = 0; t0 < s.row; t0 += s.length) {
    int64_t start = slot + t0;
    s.length = std::min(s.row - t0, w.group - start % w.group);
    turn(k, pool, threads, s, in, t0, queries, [&](int64_t b, int64_t h, int64_t t, const float* key, const float* value) {
      bool token = false;  // of any row: a slot without one pushes nothing out
      for (int64_t i = 0; i < s.batch; i++) token |= in.real[i * s.slots + slot + t];
      if (!token) return;
      int64_t row = (b * s.kv + h) * w.ring + (slot + t) % w.ring;
      k.append(w.recent[0], head, row, key);
      k.append(w.recent[1], head, row, value);
    });
    int64_t end = start + s.length, coded = w.coded(start);
    std::vector<Region> regions;
    if (coded) split(regions, {&w.k, &w.v, s.slots, 0, 0, coded}, s, threads);
    for (int64_t at = coded; at < end;) {
      int64_t last = std::min(end, at / w.ring * w.ring + w.ring);
      regions.push_back({&w.recent[0], &w.recent[1], w.ring, -(at / w.ring * w.ring), at, last});
      at = last;
    }
    attend_all(k, pool, threads, s, regions, queries, in.real, start, out + t0 * s.kv * s.group * head);
    if (w.coded(end) == coded) continue;
    std::vector<int64_t> from;  // of each slot of the group; a slot without a token stretches no scale
    int64_t token = -1;
    for (int64_t g = 0; g < w.group; g++) {
      bool any = false;
      for (int64_t i = 0; i < s.batch; i++) any |= in.real[i * s.slots + coded + g];
      from.push_back(any ? coded + g : -1);
      if (any) token = coded + g;
    }
    if (token < 0) continue;
    for (int64_t& f : from) f = (f < 0 ? token : f) % w.ring;
    parallel_for(pool, threads, s.batch * s.kv, [&](int64_t bh) {  // the oldest group leaves the ring
      static thread_local Arena scratch;
      float* x = (float*)scratch.get(w.group * head * 4);
      for (int i = 0; i < 2; i++) {
        const uint16_t* ring = (const uint16_t*)w.recent[i].data + bh * w.ring * head;
        for (int64_t g = 0; g < w.group; g++)
          for (int64_t d = 0; d < head; d++) {
            uint32_t bits = uint32_t(ring[from[g] * head + d]) << 16;
            std::memcpy(x + g * head + d, &bits, 4);
          }
        int64_t row = bh * s.slots + coded;
        if (i == 0) {
          k.append_group(w.k, head, row, x);
          continue;
        }
        for (int64_t g = 0; g < w.group; g++) k.append(w.v, head, row + g, x + g * head);
      }
    });
  }
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
  s.kv = key.dimensions()[2] / head, s.slots = real.dimensions()[1], s.row = s.length;
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
  Inputs in{(const float*)q.untyped_data(),   (const float*)key.untyped_data(), (const float*)value.untyped_data(),
            (const float*)cos.untyped_data(), (const float*)sin.untyped_data(), (const uint8_t*)real.untyped_data(),
            factor};
  int64_t threads = threads_of(pool);
  for (size_t i = 0; i < args.size(); i++) {  // in place where the caller gave the buffer up
    auto from = args.get<ffi::AnyBuffer>(i);
    auto to = rets.get<ffi::AnyBuffer>(i + 1);
    if (!from.has_value() || !to.has_value() || from->element_type() != (*to)->element_type() ||
        from->element_count() != (*to)->element_count())
      return bad("a buffer comes back as another");
    if (from->untyped_data() != (*to)->untyped_data())
      std::memcpy((*to)->untyped_data(), from->untyped_data(), from->size_bytes());
  }
  if (args.size() == 6) {
    Window w;
    int64_t rows = s.batch * s.kv;
    D types[] = {D::U8, D::U8, D::BF16, D::F32, D::BF16, D::BF16};
    void* data[6];
    int64_t counts[6];
    for (int i = 0; i < 6; i++) {
      auto to = *rets.get<ffi::AnyBuffer>(i + 1);
      if (to->element_type() != types[i]) return bad("a windowed cache is two of uint8, bfloat16, float32, and two of bfloat16");
      data[i] = to->untyped_data(), counts[i] = int64_t(to->element_count());
    }
    int64_t groups = counts[2] / (rows * 2 * head);
    w.ring = counts[4] / (rows * head), w.group = groups ? s.slots / groups : 0;
    if (head % 32 || counts[0] * 2 != entries * head || counts[1] != counts[0] || counts[2] != rows * groups * 2 * head ||
        counts[3] != entries * 2 || counts[4] != rows * w.ring * head || counts[5] != counts[4] || w.group < 16 ||
        w.group % 16 || w.group * groups != s.slots || w.ring < 2 * w.group || w.ring % w.group)
      return bad("a windowed cache has another shape");
    w.k = {Type::none, data[0], nullptr, (uint16_t*)data[2], w.group};
    w.v = {Type::none, data[1], (float*)data[3]};
    w.recent[0] = {Type::bf16, data[4]}, w.recent[1] = {Type::bf16, data[5]};
    windowed(k, pool, threads, s, in, w, slot, (float*)arena.get(query_bytes), out);
    return ffi::Error::Success();
  }
  Cache caches[2];
  char* at;
  if (args.size() == 0) {  // no cache: keys and values of these tokens alone
    if (slot != 0 || s.slots != s.length) return bad("without a cache the slots are the tokens");
    at = arena.get(query_bytes + 2 * entries * head * 4);
    for (int i = 0; i < 2; i++) caches[i].data = at + query_bytes + i * entries * head * 4;
  } else {
    at = arena.get(query_bytes);
    bool scaled = args.size() == 4;
    if (args.size() != 2 && !scaled) return bad("a cache is two buffers, four with scales, or six with a window");
    for (size_t i = 0; i < args.size(); i++) {
      auto to = *rets.get<ffi::AnyBuffer>(i + 1);
      Cache& c = caches[i % 2];
      int64_t values = int64_t(to->element_count());
      if (i < 2) {
        D t = to->element_type();
        c.data = to->untyped_data();
        c.type = t == D::F32 ? Type::f32 : t == D::BF16 ? Type::bf16 : t == D::S8 ? Type::u8 : Type::none;
        if (c.type == Type::none) return bad("a cache holds float32, bfloat16 or int8");
        if (values != entries * head) return bad("a cache has another shape");
        if ((c.type == Type::u8) != scaled) return bad("codes go with scales, floats without");
      } else {
        c.scale = (float*)to->untyped_data();
        if (to->element_type() != D::F32 || values != entries) return bad("scales have another shape");
      }
    }
  }

  float* queries = (float*)at;
  turn(k, pool, threads, s, in, 0, queries, [&](int64_t b, int64_t h, int64_t t, const float* key, const float* value) {
    int64_t row = (b * s.kv + h) * s.slots + slot + t;
    k.append(caches[0], head, row, key);
    k.append(caches[1], head, row, value);
  });
  std::vector<Region> regions;
  split(regions, {&caches[0], &caches[1], s.slots, 0, 0, slot + s.length}, s, threads);
  attend_all(k, pool, threads, s, regions, queries, in.real, slot, out);
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
