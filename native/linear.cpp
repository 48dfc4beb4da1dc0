// `lmc_linear`: one input times one or more weights in tiles, with operands checked and work shared out.
#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace lmc {
namespace {

// The numbers that describe a weight, in the order in which Python writes them.
enum Field {
  kCodes, kBits, kInputs, kOutputs, kGroup, kPackedGroup, kOffset, kN, kM, kScale, kZero, kMinimum, kOuter, kTable,
  kValue, kFields
};

enum Activations { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt8Token = 3 };  // the last: one scale for a token

constexpr int64_t kSpare = 64;  // entries past the last value of a bitmap, which a vector load may touch

ffi::Error bad(const std::string& what) { return ffi::Error::InvalidArgument("lmc: " + what); }

Type type_of(ffi::DataType t) {
  switch (t) {
    case ffi::DataType::F32: return Type::f32;
    case ffi::DataType::F16: return Type::f16;
    case ffi::DataType::BF16: return Type::bf16;
    case ffi::DataType::U8: return Type::u8;
    case ffi::DataType::F8E8M0FNU: return Type::e8m0;
    case ffi::DataType::F8E4M3FN: return Type::e4m3;
    default: return Type::none;
  }
}

// Reads operands one after another, each checked for its type and for how many values it must hold.
class Operands {
 public:
  explicit Operands(ffi::RemainingArgs args) : args_(args) {}
  const void* next(const char* name, int64_t values, std::initializer_list<ffi::DataType> types, Type* type = nullptr) {
    if (!error_.empty()) return nullptr;
    if (at_ >= args_.size()) return fail(std::string("no operand is left for ") + name);
    auto found = args_.get<ffi::AnyBuffer>(at_++);
    if (!found.has_value()) return fail(std::string("no buffer for ") + name);
    bool known = false;
    for (auto t : types) known |= t == found->element_type();
    if (!known) return fail(std::string(name) + " has a dtype that this form does not take");
    if (values >= 0 && int64_t(found->element_count()) != values)
      return fail(std::string(name) + " holds " + std::to_string(found->element_count()) + " values, " +
                  std::to_string(values) + " are needed");
    count_ = int64_t(found->element_count());
    if (type) *type = type_of(found->element_type());
    return found->untyped_data();
  }
  int64_t count() const { return count_; }
  bool at_end() const { return at_ == args_.size(); }
  const std::string& error() const { return error_; }
  const void* fail(std::string what) {
    if (error_.empty()) error_ = std::move(what);
    return nullptr;
  }

 private:
  ffi::RemainingArgs args_;
  size_t at_ = 0;
  int64_t count_ = 0;
  std::string error_;
};

Weight read_weight(const int64_t* f, Operands& from) {
  using D = ffi::DataType;
  Weight w;
  for (Field small : {kCodes, kBits, kOffset, kN, kM, kOuter, kValue})
    if (f[small] < 0 || f[small] > 1 << 16) {
      from.fail("a weight's description is out of range");
      return w;
    }
  w.codes = Codes(f[kCodes]), w.bits = int(f[kBits]), w.inputs = f[kInputs], w.outputs = f[kOutputs];
  w.group = f[kGroup], w.packed_group = f[kPackedGroup], w.offset = int(f[kOffset]), w.n = int(f[kN]), w.m = int(f[kM]);
  w.value_type = Type(f[kValue]);
  constexpr int64_t kMost = int64_t{1} << 40;  // of any extent: products of a few stay within 64 bits
  if (w.inputs > kMost || w.outputs > kMost || w.group > kMost ||
      double(w.inputs) / double(w.packed_group) * double(w.group) * double(w.outputs) > 1e15) {
    from.fail("a weight's description is out of range");
    return w;
  }
  if (!w.plain() && w.codes != Codes::bfloat16 && w.value_type != Type::f32 && w.value_type != Type::bf16 &&
      w.value_type != Type::u8) {
    from.fail("sparse values are float32, bfloat16 or codes");
    return w;
  }
  if (w.inputs < 1 || w.outputs < 1 || w.bits < 1 || w.bits > 16 || w.group < 1 || w.packed_group < 1 ||
      w.packed_group > w.group || f[kCodes] < 0 || f[kCodes] > 4 || (w.plain() && w.bits > 8) ||
      (w.plain() && ((w.group != 16 && w.group % 32) || w.offset > 255))) {
    from.fail("a weight's description is out of range");
    return w;
  }
  int64_t packed = w.inputs;
  if (w.group != w.packed_group) packed = (w.inputs + w.packed_group - 1) / w.packed_group * w.group;
  w.blocks = (packed + 31) / 32;
  w.groups = !w.plain() ? 1 : w.group == 16 ? 2 * w.blocks : (32 * w.blocks + w.group - 1) / w.group;
  int64_t per_group = w.tiles() * w.groups * 16;
  int64_t depth = w.padded();
  switch (w.codes) {
    case Codes::bfloat16:
      w.data = (const uint8_t*)from.next("pairs", w.tiles() * depth * 16, {D::BF16});
      break;
    case Codes::n_of_m: {
      int values = w.m > 0 && 16 % w.m == 0 ? 16 * w.n / w.m : 0, bits = w.m <= 2 ? 1 : w.m <= 4 ? 2 : w.m <= 8 ? 3 : 4;
      if ((values != 4 && values != 8 && values != 12) || values * bits > 32) {
        from.fail("n:m is not one that the kernel takes");
        return w;
      }
      int64_t windows = w.tiles() * depth / 16;
      w.data = (const uint8_t*)from.next("values", windows * values * 16, {w.value_type == Type::f32 ? D::F32 : w.value_type == Type::bf16 ? D::BF16 : D::U8});
      w.index = (const uint8_t*)from.next("positions", windows * 16, {values * bits <= 16 ? D::U16 : D::U32});
      break;
    }
    case Codes::bitmap:
      w.data = (const uint8_t*)from.next("values", -1, {w.value_type == Type::f32 ? D::F32 : w.value_type == Type::bf16 ? D::BF16 : D::U8});
      w.stored = from.count();
      if (w.stored < kSpare) from.fail("values lack their spare entries at the end");
      w.index = (const uint8_t*)from.next("masks", w.tiles() * depth, {D::U16});
      w.start = (const uint32_t*)from.next("starts", w.tiles() + 1, {D::U32});
      break;
    default:
      w.data = (const uint8_t*)from.next("codes", w.tiles() * w.blocks * w.bits * 64, {D::U8});
  }
  if (f[kScale])
    w.scale = from.next("scales", w.plain() ? per_group : w.tiles() * 16,
                        {D::F32, D::F16, D::BF16, D::U8, D::F8E8M0FNU, D::F8E4M3FN}, &w.scale_type);
  if (f[kZero]) w.zero = (const uint8_t*)from.next("zero points", per_group, {D::U8});
  if (f[kMinimum]) {
    Type type = Type::none;
    w.minimum = from.next("minimums", per_group, {D::F32, D::F16, D::BF16}, &type);
    if (type != w.scale_type) from.fail("minimums have another dtype than scales");
  }
  w.outer_mode = f[kOuter];
  if (w.outer_mode) {
    int64_t chunks = (w.tiles() + 15) / 16;
    w.outer_groups = (w.groups + 255) / 256;
    w.outer = (const float*)from.next(
        "scales of scales",
        w.outer_mode == 1 ? 1 : w.outer_mode == 2 ? chunks * w.groups * 2 : w.tiles() * w.outer_groups * 32, {D::F32});
  }
  if (f[kTable]) w.table = (const float*)from.next("table", int64_t{1} << w.bits, {D::F32});
  if (w.codes == Codes::table && !w.table) from.fail("a table's codes come without their table");
  return w;
}

// Whether a tile of a bitmap has as many values as its masks have bits, all of them within the buffer.
bool bitmap_fits(const Weight& w, int64_t tile) {
  if (w.codes != Codes::bitmap) return true;
  int64_t bits = 0, first = w.start[tile], last = w.start[tile + 1];
  const uint64_t* words = (const uint64_t*)((const uint16_t*)w.index + tile * w.padded());
  for (int64_t i = 0; i < w.padded() / 4; i++) bits += __builtin_popcountll(words[i]);
  return first + bits == last && last + kSpare <= w.stored;
}

// Rows as the weights want them: inputs scattered to padded groups, quantized, summed by group. Weights that want the
// same share it.
struct Prepared {
  int64_t width, group, packed_group, groups;
  int offset;
  bool sums;
  Rows rows;
  bool fits(const Weight& w, bool need_sums, int64_t unit) const {
    return width == w.padded() && group == w.group && packed_group == w.packed_group && groups == w.groups &&
           (!rows.q || (offset == w.code_offset() && rows.unit == unit)) && (sums || !need_sums);
  }
};

struct Layout {  // of what a thread prepares, in one arena
  int64_t x = 0, bf16 = 0, q = 0, scale = 0, starts = 0, sums = 0, end = 0;
  Layout(const Weight& w, int64_t rows, int activations, bool scatter, bool need_sums) {
    auto take = [&](int64_t bytes) {
      int64_t at = end;
      end = (end + bytes + 63) / 64 * 64;
      return at;
    };
    int64_t values = rows * w.padded() + 64;
    x = take(scatter ? values * 4 : 0);
    bf16 = take(activations == kBfloat16 ? values * 2 : 0);
    q = take(activations == kInt8 ? values : 0);
    scale = take(activations == kInt8 ? rows * w.units() * 4 : 0);
    starts = take(activations == kInt8 ? rows * w.units() * 4 : 0);
    sums = take(need_sums ? rows * w.groups * 4 : 0);
  }
};

constexpr int64_t kFew = 8;           // rows up to which codes are decoded for every product of floats,
constexpr int64_t kFewInt8 = 2;       // and of integers
constexpr int64_t kShare = 1 << 12;   // values from which preparing several rows is shared out

void fill_row(const Weight& w, const Kernels& k, const float* from, int64_t r, int64_t inputs, bool scatter,
              int activations, bool token, int64_t unit, char* arena, const Layout& at, bool need_sums) {
  int64_t width = w.padded();
  const float* x = from;
  if (scatter) {
    float* to = (float*)(arena + at.x) + r * width;
    if (w.packed_group == w.group || w.groups == 1) {
      std::copy(from, from + inputs, to);
      std::fill(to + inputs, to + width, 0.f);
    } else {
      std::fill(to, to + width, 0.f);
      for (int64_t g = 0, i = 0; i < inputs; g++, i += w.packed_group)
        std::copy(from + i, from + std::min(inputs, i + w.packed_group), to + g * w.group);
    }
    x = to;
  }
  if (activations == kBfloat16) k.to_bf16(x, width, (uint16_t*)(arena + at.bf16) + r * width);
  float* sums = (float*)(arena + at.sums) + r * w.groups;
  if (activations == kInt8) {
    int64_t units = (width + unit - 1) / unit, in_group = w.groups == 1 ? units : w.group / unit;
    float* scale = (float*)(arena + at.scale) + r * units;
    int32_t* starts = (int32_t*)(arena + at.starts) + r * units;
    (token ? k.quantize_token : k.quantize_units)(x, width, unit, (int8_t*)(arena + at.q) + r * width, scale, starts);
    if (need_sums) {
      std::fill(sums, sums + w.groups, 0.f);
      for (int64_t u = 0; u < units; u++) sums[u / in_group] += scale[u] * float(starts[u]);
    }
    for (int64_t u = 0; u < units; u++) starts[u] *= -w.code_offset();
  } else if (need_sums) {
    k.group_sums(x, width, w.group, sums);
  }
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const int64_t> forms, int64_t activations) {
  const Kernels& k = kernels();
  auto dims = x.dimensions();
  if (x.element_type() != ffi::DataType::F32 || dims.size() != 2) return bad("x is not float32 [rows, inputs]");
  if (forms.size() % kFields) return bad("the description of the weights is cut off");
  if (activations < 0 || activations > 3) return bad("activations are float32, bfloat16, int8 or int8 by the token");
  int64_t rows = dims[0], inputs = dims[1], count = int64_t(forms.size()) / kFields;
  if (int64_t(rets.size()) != count) return bad("there are not as many outputs as weights");
  Operands operands(args);
  std::vector<Weight> weights;
  std::vector<float*> outputs;
  for (int64_t i = 0; i < count; i++) {
    weights.push_back(read_weight(forms.begin() + i * kFields, operands));
    if (!operands.error().empty()) return bad(operands.error());
    const Weight& w = weights.back();
    if (w.inputs != inputs) return bad("x has " + std::to_string(inputs) + " inputs, a weight " + std::to_string(w.inputs));
    auto y = rets.get<ffi::AnyBuffer>(i);
    if (!y.has_value() || (*y)->element_type() != ffi::DataType::F32 || int64_t((*y)->element_count()) != rows * w.outputs)
      return bad("an output is not float32 [rows, outputs]");
    outputs.push_back((float*)(*y)->untyped_data());
  }
  if (!operands.at_end()) return bad("operands are left over");
  if (rows == 0) return ffi::Error::Success();

  const float* values = (const float*)x.untyped_data();
  int64_t threads = threads_of(pool);
  static thread_local std::vector<Prepared> prepared;
  static thread_local std::vector<Arena> arenas;
  if (int64_t(arenas.size()) < count) arenas.resize(count);
  prepared.clear();
  std::vector<int64_t> form_of(count);
  bool token = activations == kInt8Token;
  auto int8 = [&](const Weight& w) { return (token || activations == kInt8) && w.codes == Codes::integer; };
  auto many = [&](const Weight& w) { return rows > (int8(w) ? kFewInt8 : kFew); };
  auto bf16 = [&](const Weight& w) { return many(w) && activations == kBfloat16 && !int8(w); };
  for (int64_t i = 0; i < count; i++) {
    const Weight& w = weights[i];
    int mode = int8(w) ? kInt8 : bf16(w) ? kBfloat16 : kFloat32;
    bool sums = w.plain() && (w.zero || w.minimum) && (mode == kInt8 || !many(w));
    int64_t unit = token && many(w) ? w.long_unit() : w.unit();
    int64_t j = 0;
    for (; j < int64_t(prepared.size()); j++) {
      const Prepared& p = prepared[j];
      bool has = mode == kInt8 ? p.rows.q != nullptr : mode == kBfloat16 ? p.rows.bf16 != nullptr : p.rows.q == nullptr && p.rows.bf16 == nullptr;
      if (has && p.fits(w, sums, unit)) break;
    }
    form_of[i] = j;
    if (j < int64_t(prepared.size())) continue;
    bool scatter = w.padded() != inputs;
    Layout at(w, rows, mode, scatter, sums);
    char* arena = arenas[j].get(at.end + 64);
    Rows r;
    r.count = rows, r.width = w.padded();
    r.x = scatter ? (float*)(arena + at.x) : values;
    r.stride = scatter ? r.width : inputs;
    r.bf16 = mode == kBfloat16 ? (uint16_t*)(arena + at.bf16) : nullptr;
    r.q = mode == kInt8 ? (int8_t*)(arena + at.q) : nullptr;
    r.unit = unit;
    r.scale = mode == kInt8 ? (float*)(arena + at.scale) : nullptr;
    r.starts = mode == kInt8 ? (int32_t*)(arena + at.starts) : nullptr;
    r.sums = sums ? (float*)(arena + at.sums) : nullptr;
    auto fill = [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; n++)
        fill_row(w, k, values + n * inputs, n, inputs, scatter, mode, token, unit, arena, at, sums);
    };
    bool any = scatter || mode != kFloat32 || sums;
    bool share = rows > 1 && rows * w.padded() >= kShare;
    if (any && !share) fill(0, rows);
    if (any && share) {
      int64_t parts = std::min(rows, threads * 4);
      parallel_for(pool, threads, parts, [&](int64_t p) { fill(rows * p / parts, rows * (p + 1) / parts); });
    }
    prepared.push_back({w.padded(), w.group, w.packed_group, w.groups, w.code_offset(), sums, r});
  }

  std::atomic<bool> broken{false};  // a bitmap whose masks do not fit its starts
  // Units of one tile (few rows) or two (many), over all weights one after another.
  auto unit_of = [&](const Weight& w) { return many(w) ? 2 : 1; };
  std::vector<int64_t> ends;
  int64_t total = 0, work = 0;
  for (const Weight& w : weights) {
    ends.push_back(total += (w.tiles() + unit_of(w) - 1) / unit_of(w));
    work += w.tiles() * w.blocks;
  }
  int64_t chunks = std::min(total, work * rows < 64 ? 1 : std::max<int64_t>(threads * 4, rows > 32 ? total : total / 24));
  if (threads == 1) chunks = 1;
  const Prepared* shared = prepared.data();
  parallel_for(pool, threads, chunks, [&](int64_t c) {
    static thread_local Arena scratch;
    int64_t first = total * c / chunks, last = total * (c + 1) / chunks, i = 0;
    for (int64_t u = first; u < last; u++) {
      while (u >= ends[i]) i++;
      const Weight& w = weights[i];
      const Rows& r = shared[form_of[i]].rows;
      int64_t unit = unit_of(w), tile = (u - (i ? ends[i - 1] : 0)) * unit;
      float* y = outputs[i] + 16 * tile;
      bool fits = true;
      for (int64_t t = tile; t < std::min(tile + unit, w.tiles()); t++) fits &= bitmap_fits(w, t);
      if (!fits) {
        broken = true;
        continue;
      }
      if (!many(w)) {
        (r.q ? k.few_int8 : k.few_float)(w, tile, r, y, w.outputs);
        continue;
      }
      int tiles = int(std::min(unit, w.tiles() - tile));
      char* at = scratch.get(tiles * w.padded() * 64 + 4 * 16 * 4 * w.groups + w.padded() * 64 + 256);
      (r.q ? k.many_int8 : r.bf16 ? k.many_bf16 : k.many_float)(w, tile, tiles, r, y, w.outputs, at);
    }
  });
  return broken ? bad("a bitmap's masks and starts do not fit its values") : ffi::Error::Success();
}

// Rows of a table: ids [..] int32 -> [.., features] float32. Ids outside are clamped, as XLA's gather does.
ffi::Error embed(ffi::ThreadPool pool, ffi::AnyBuffer ids, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out,
                 ffi::Span<const int64_t> form) {
  const Kernels& k = kernels();
  if (ids.element_type() != ffi::DataType::S32) return bad("ids are not int32");
  if (form.size() != kFields) return bad("the description of the table is cut off");
  Operands operands(args);
  Weight w = read_weight(form.begin(), operands);
  if (!operands.error().empty()) return bad(operands.error());
  int64_t n = int64_t(ids.element_count());
  if (out->element_type() != ffi::DataType::F32 || int64_t(out->element_count()) != n * w.inputs)
    return bad("the output is not float32 [.., features]");
  if (n && !w.outputs) return bad("the table has no rows");
  const int32_t* id = (const int32_t*)ids.untyped_data();
  float* y = (float*)out->untyped_data();
  int64_t threads = threads_of(pool), parts = n < 64 ? 1 : threads * 4;
  std::atomic<bool> broken{false};
  parallel_for(pool, threads, parts, [&](int64_t p) {
    static thread_local Arena scratch;
    float* row = (float*)scratch.get(w.padded() * 4 + 64);
    for (int64_t i = n * p / parts; i < n * (p + 1) / parts; i++) {
      if (!bitmap_fits(w, std::clamp<int64_t>(id[i], 0, w.outputs - 1) / 16)) {
        broken = true;
        return;
      }
      k.row(w, std::clamp<int64_t>(id[i], 0, w.outputs - 1), row);
      float* to = y + i * w.inputs;
      if (w.packed_group == w.group || w.groups == 1) {
        std::copy(row, row + w.inputs, to);
      } else {
        for (int64_t g = 0, j = 0; j < w.inputs; g++, j += w.packed_group)
          std::copy(row + g * w.group, row + g * w.group + std::min(w.packed_group, w.inputs - j), to + j);
      }
    }
  });
  return broken ? bad("a bitmap's masks and starts do not fit its values") : ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lmc_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("forms")
                                  .Attr<int64_t>("activations"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(lmc_embed, embed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("form"));

}  // namespace lmc
