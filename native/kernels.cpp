// The kernels, compiled once for each instruction set (LMC_ISA names the namespace and the table).
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace lmc {
namespace LMC_ISA {
namespace {

// ------------------------------------------------------------------------------------------------ decoding

// Fields of one bit plane of width `w`, shifted into place in the codes of a block.
template <int w>
inline void add_plane(const uint8_t* p, int shift, u32 (&codes)[8]) {
  constexpr int fields = 8 / w;
  constexpr uint32_t mask = ((1u << w) - 1) * 0x01010101u;
  for (int j = 0; j < w; j++) {
    u32 v = load<u32>(p + 64 * j);
    for (int f = 0; f < fields; f++) codes[j * fields + f] |= ((v >> (w * f)) & mask) << shift;
  }
}

// The 512 codes of a block: codes[v], lane o, byte b is input 4 v + b of output o.
template <int bits>
inline void unpack(const uint8_t* p, u32 (&codes)[8]) {
  if constexpr (bits == 8) {
    for (int v = 0; v < 8; v++) codes[v] = load<u32>(p + 64 * v);
    return;
  }
  for (auto& c : codes) c = u32{};
  constexpr int first = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
  add_plane<first>(p, 0, codes);
  constexpr int rest = bits - first;
  if constexpr (rest == 3) {
    add_plane<2>(p + 64 * first, first, codes);
    add_plane<1>(p + 64 * (first + 2), first + 2, codes);
  } else if constexpr (rest > 0) {
    add_plane<rest>(p + 64 * first, first, codes);
  }
}

inline f32 scale_at(Type type, const void* p, int64_t i) {
  switch (type) {
    case Type::f32: return load<f32>((const float*)p + i);
    case Type::f16: return f16_to_f32((const uint16_t*)p + i);
    case Type::bf16: return bf16_to_f32((const uint16_t*)p + i);
    case Type::e8m0: return as_f32(widen(load<u8x16>((const uint8_t*)p + i)) << 23);
    case Type::e4m3: {
      u32 c = widen(load<u8x16>((const uint8_t*)p + i));
      u32 magnitude = c & 0x7fu;
      // exponent bias 7 to 127; subnormals are the mantissa times 2**-9
      f32 normal = as_f32((magnitude << 20) + (120u << 23));
      f32 small = to_f32(magnitude) * 0.001953125f;
      u32 is_small = (u32)(magnitude < 8u);
      return as_f32(as_u32(select(is_small, small, normal)) | (c & 0x80u) << 24);
    }
    default: return to_f32(widen(load<u8x16>((const uint8_t*)p + i)));
  }
}

// Scale and minimum of each group of a tile, so that dense = value * scale + minimum.
// `centered`: values have the offset taken off already. Returns whether any minimum is not zero.
bool affine(const Weight& w, int64_t tile, bool centered, float* scale, float* minimum) {
  bool any = w.minimum || w.zero || (!centered && w.offset);
  if (!any && w.scale && !w.outer_mode) {  // most weights: scales alone, one conversion
    std::memset(minimum, 0, w.groups * 64);
    auto convert = [&]<Type type>() {
      for (int64_t g = 0; g < w.groups; g++) store(scale + 16 * g, scale_at(type, w.scale, (tile * w.groups + g) * 16));
    };
    if (w.scale_type == Type::bf16) return convert.template operator()<Type::bf16>(), false;
    if (w.scale_type == Type::f16) return convert.template operator()<Type::f16>(), false;
    if (w.scale_type == Type::f32) return convert.template operator()<Type::f32>(), false;
  }
  for (int64_t g = 0; g < w.groups; g++) {
    int64_t at = (tile * w.groups + g) * 16;
    f32 s = splat(1.f), m = f32{};
    if (w.scale) s = scale_at(w.scale_type, w.scale, at);
    if (w.outer_mode == 1) s *= w.outer[0];
    if (w.outer_mode == 2) {
      const float* o = w.outer + ((tile / 16) * w.groups + g) * 2;
      s = s * o[0] + o[1];
    }
    if (w.outer_mode == 3) {
      const float* o = w.outer + (tile * w.outer_groups + g / 256) * 32;
      s = s * load<f32>(o) + load<f32>(o + 16);
    }
    if (w.minimum) {
      m = scale_at(w.scale_type, w.minimum, at);
    } else if (w.zero) {
      m = -to_f32(widen(load<u8x16>(w.zero + at))) * s;
    } else if (!centered && w.offset) {
      m = s * float(-w.offset);
    }
    store(scale + 16 * g, s);
    store(minimum + 16 * g, m);
  }
  return any;
}

// Whether the float kernels read codes through a table of 16 values (which centers integers for nothing).
inline bool by_table16(const Weight& w) {
#if defined(__AVX512F__)
  return w.bits <= 4;
#else
  return w.bits <= 4 && w.codes == Codes::table;
#endif
}

inline f32 table16(const Weight& w) {
  f32 t = f32{};
  for (int i = 0; i < 16 && i < 1 << w.bits; i++) t[i] = w.codes == Codes::table ? w.table[i] : float(i - w.offset);
  return t;
}

struct Scratch {  // of one tile's scales, on the stack up to a size
  float* scale;
  float* minimum;
  float inside[2 * 16 * 128];
  float* heap = nullptr;
  explicit Scratch(int64_t groups) {
    float* at = inside;
    if (groups > 128) at = heap = new float[2 * 16 * groups];
    scale = at, minimum = at + 16 * groups;
  }
  ~Scratch() { delete[] heap; }
};

// ------------------------------------------------------------------------------------------------ few rows, float

enum class Read { convert, table16, table256 };

#if defined(__AVX512VBMI__)
// A table of up to 256 float32 values as four planes of bytes in registers.
struct Planes {
  __m512i part[4][4];
  explicit Planes(const float* table, int entries) {
    alignas(64) uint8_t bytes[4][256] = {};
    for (int i = 0; i < entries; i++) {
      uint32_t bits;
      std::memcpy(&bits, table + i, 4);
      for (int p = 0; p < 4; p++) bytes[p][i] = uint8_t(bits >> (8 * p));
    }
    for (int p = 0; p < 4; p++)
      for (int q = 0; q < 4; q++) part[p][q] = _mm512_load_si512(bytes[p] + 64 * q);
  }
  // Values of 64 codes: in[i], 128-bit lane L, lane k is input k of output 4 L + i.
  template <int bits>
  void read(__m512i codes, f32 (&in)[4]) const {
    __m512i r[4];
    for (int p = 0; p < 4; p++) {
      if constexpr (bits <= 6) {
        r[p] = _mm512_permutexvar_epi8(codes, part[p][0]);
      } else {
        r[p] = _mm512_permutex2var_epi8(part[p][0], codes, part[p][1]);
        if constexpr (bits == 8)
          r[p] = _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), r[p],
                                        _mm512_permutex2var_epi8(part[p][2], codes, part[p][3]));
      }
    }
    __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpacklo_epi8(r[2], r[3]);
    __m512i c = _mm512_unpackhi_epi8(r[0], r[1]), d = _mm512_unpackhi_epi8(r[2], r[3]);
    in[0] = (f32)_mm512_unpacklo_epi16(a, b), in[1] = (f32)_mm512_unpackhi_epi16(a, b);
    in[2] = (f32)_mm512_unpacklo_epi16(c, d), in[3] = (f32)_mm512_unpackhi_epi16(c, d);
  }
};

inline f32 four_to_one(const f32 (&a)[4]) {
  __m512 t01 = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[0], (__m512)a[1]), _mm512_unpackhi_ps((__m512)a[0], (__m512)a[1]));
  __m512 t23 = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2], (__m512)a[3]), _mm512_unpackhi_ps((__m512)a[2], (__m512)a[3]));
  return (f32)_mm512_add_ps(
      (__m512)_mm512_unpacklo_pd((__m512d)t01, (__m512d)t23), (__m512)_mm512_unpackhi_pd((__m512d)t01, (__m512d)t23));
}

template <int bits, int rows, int span>
void few_table256(const Weight& w, int64_t tile, const Rows& x, int64_t r0, float* y, int64_t ldy) {
  Scratch scratch(w.groups);
  bool shifted = affine(w, tile, true, scratch.scale, scratch.minimum);
  const Planes planes(w.table, 1 << bits);
  const uint8_t* p = w.data + tile * w.blocks * (bits * 64);
  f32 total[rows] = {};
  int64_t blocks_in_group = std::max<int64_t>(1, w.group / 32), g = 0;
  for (int64_t first = 0; first < w.blocks; first += blocks_in_group) {
    f32 part[rows][4] = {};
    int64_t last = std::min(w.blocks, first + blocks_in_group);
    auto flush = [&] {
      f32 s = load<f32>(scratch.scale + 16 * g);
      for (int r = 0; r < rows; r++) {
        total[r] += four_to_one(part[r]) * s;
        if (shifted) total[r] += load<f32>(scratch.minimum + 16 * g) * x.sums[(r0 + r) * w.groups + g];
        for (auto& v : part[r]) v = f32{};
      }
      g++;
    };
    for (int64_t b = first; b < last; b++, p += bits * 64) {
      u32 codes[8];
      unpack<bits>(p, codes);
      for (int v = 0; v < 8; v++) {
        f32 in[4];
        planes.read<bits>((__m512i)codes[v], in);
        for (int r = 0; r < rows; r++) {
          f32 xs = (f32)_mm512_broadcast_f32x4(_mm_loadu_ps(x.x + (r0 + r) * x.stride + 32 * b + 4 * v));
          for (int i = 0; i < 4; i++) part[r][i] += in[i] * xs;
        }
        if (span < 8 && v == span - 1) flush();
      }
    }
    flush();
  }
  for (int r = 0; r < rows; r++)
    store_some(y + (r0 + r) * ldy, total[r], int(std::min<int64_t>(16, w.outputs - 16 * tile)));
}
#endif

template <int bits, Read read, int rows, int span>
void few_plain(const Weight& w, int64_t tile, const Rows& x, int64_t r0, float* y, int64_t ldy) {
  Scratch scratch(w.groups);
  bool shifted = affine(w, tile, true, scratch.scale, scratch.minimum);
  const f32 table = read == Read::table16 ? table16(w) : f32{};
  const uint8_t* p = w.data + tile * w.blocks * (bits * 64);
  constexpr int chains = rows == 1 ? 4 : rows == 2 ? 2 : 1;
  f32 total[rows] = {};
  int64_t blocks_in_group = std::max<int64_t>(1, w.group / 32), g = 0;
  for (int64_t first = 0; first < w.blocks; first += blocks_in_group) {
    f32 part[rows][chains] = {};
    int64_t last = std::min(w.blocks, first + blocks_in_group);
    auto flush = [&] {
      f32 s = load<f32>(scratch.scale + 16 * g);
      for (int r = 0; r < rows; r++) {
        f32 t = part[r][0];
        for (int c = 1; c < chains; c++) t += part[r][c];
        total[r] += t * s;
        if (shifted) total[r] += load<f32>(scratch.minimum + 16 * g) * x.sums[(r0 + r) * w.groups + g];
        for (auto& v : part[r]) v = f32{};
      }
      g++;
    };
    for (int64_t b = first; b < last; b++, p += bits * 64) {
      const float* xs = x.x + r0 * x.stride + 32 * b;
      auto add = [&](int k, f32 value) {
        for (int r = 0; r < rows; r++) part[r][k % chains] += value * xs[r * x.stride + k];
      };
      if constexpr (bits == 4 && read == Read::table16) {
        for (int j = 0; j < 4; j++) {
          u32 v = load<u32>(p + 64 * j);
          for (int i = 0; i < 8; i++) add(8 * j + 4 * (i & 1) + i / 2, lookup16(table, v >> (4 * i)));
          if (span < 8 && j == span / 2 - 1) flush();
        }
      } else {
        u32 codes[8];
        unpack<bits>(p, codes);
        for (int v = 0; v < 8; v++) {
          for (int i = 0; i < 4; i++) {
            u32 code = (codes[v] >> (8 * i)) & 0xffu;
            f32 value;
            if constexpr (read == Read::convert) value = to_f32((i32)code - w.code_offset());  // centered: sums stay small
            if constexpr (read == Read::table16) value = lookup16(table, code);
            if constexpr (read == Read::table256)
              for (int o = 0; o < 16; o++) value[o] = w.table[code[o]];
            add(4 * v + i, value);
          }
          if (span < 8 && v == span - 1) flush();
        }
      }
    }
    flush();
  }
  for (int r = 0; r < rows; r++)
    store_some(y + (r0 + r) * ldy, total[r], int(std::min<int64_t>(16, w.outputs - 16 * tile)));
}

template <int rows>
void few_bf16(const Weight& w, int64_t tile, const Rows& x, int64_t r0, float* y, int64_t ldy) {
  const uint8_t* p = w.data + tile * w.blocks * 1024;
  constexpr int chains = rows == 1 ? 4 : rows == 2 ? 2 : 1;
  f32 part[rows][chains] = {};
  for (int64_t k = 0; k < w.padded(); k += 8, p += 256)
    for (int j = 0; j < 4; j++) {
      u32 pair = load<u32>(p + 64 * j);
      f32 even = as_f32(pair << 16), odd = as_f32(pair & 0xffff0000u);
      for (int r = 0; r < rows; r++) {
        const float* xs = x.x + (r0 + r) * x.stride + k + 2 * j;
        part[r][(2 * j) % chains] += even * xs[0];
        part[r][(2 * j + 1) % chains] += odd * xs[1];
      }
    }
  for (int r = 0; r < rows; r++) {
    f32 t = part[r][0];
    for (int c = 1; c < chains; c++) t += part[r][c];
    store_some(y + (r0 + r) * ldy, t, int(std::min<int64_t>(16, w.outputs - 16 * tile)));
  }
}

inline int index_bits(int m) { return m <= 2 ? 1 : m <= 4 ? 2 : m <= 8 ? 3 : 4; }

inline int value_bytes(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

// Value j of a window of n:m, for 16 outputs.
inline f32 sparse_value(const Weight& w, const uint8_t* values, int j) {
  if (w.value_type == Type::f32) return load<f32>(values + 64 * j);
  if (w.value_type == Type::bf16) return bf16_to_f32((const uint16_t*)values + 16 * j);
  return to_f32((load<u32>(values + 64 * (j / 4)) >> (8 * (j % 4))) & 0xffu) - float(w.offset);
}

struct Window {  // of 16 inputs: how many values it holds and where they lie
  int values, bits, bytes, index_bytes;
  explicit Window(const Weight& w)
      : values(16 * w.n / w.m), bits(index_bits(w.m)), bytes(values * 16 * value_bytes(w.value_type)),
        index_bytes(values * bits <= 16 ? 32 : 64) {}
  u32 index(const uint8_t* p) const { return index_bytes == 32 ? widen(load<u16x16>(p)) : load<u32>(p); }
};

template <Type type, int values>
inline void few_window(const Weight& w, const Window& at, const uint8_t* p, u32 index, f32 x, f32 (&part)[2]) {
  for (int j = 0; j < values; j++) {
    u32 where = ((index >> (at.bits * j)) & uint32_t(w.m - 1)) | uint32_t(j / w.n * w.m);
    f32 value;
    if constexpr (type == Type::f32) value = load<f32>(p + 64 * j);
    if constexpr (type == Type::bf16) value = bf16_to_f32((const uint16_t*)p + 16 * j);
    if constexpr (type == Type::u8) value = to_f32(((load<u32>(p + 64 * (j / 4)) >> (8 * (j % 4))) & 0xffu)) - float(w.offset);
    part[j & 1] += value * lookup16(x, where);
  }
}

template <Type type, int values>
void few_n_of_m(const Weight& w, int64_t tile, const Rows& x, int64_t r, float* y, int64_t ldy) {
  const Window at(w);
  int64_t windows = w.padded() / 16;
  const uint8_t* p = w.data + tile * windows * at.bytes;
  const uint8_t* index = w.index + tile * windows * at.index_bytes;
  f32 part[2] = {};
  for (int64_t i = 0; i < windows; i++, p += at.bytes, index += at.index_bytes)
    few_window<type, values>(w, at, p, at.index(index), load<f32>(x.x + r * x.stride + 16 * i), part);
  f32 s = w.scale ? scale_at(w.scale_type, w.scale, 16 * tile) : splat(1.f);
  store_some(y + r * ldy, (part[0] + part[1]) * s, int(std::min<int64_t>(16, w.outputs - 16 * tile)));
}

// The entries of one input of a bitmap tile, zeros where it has none; moves `p` on.
inline f32 bitmap_entries(const Weight& w, uint16_t mask, const uint8_t*& p) {
  const uint8_t* from = p;
  p += __builtin_popcount(mask) * value_bytes(w.value_type);
#if defined(__AVX512VBMI2__)
  if (w.value_type == Type::f32) return (f32)_mm512_maskz_expand_ps(mask, _mm512_loadu_ps(from));
  if (w.value_type == Type::bf16) {
    __m256i v = _mm256_maskz_expand_epi16(mask, _mm256_loadu_si256((const __m256i*)from));
    return as_f32(widen((u16x16)v) << 16);
  }
  __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  __m512 v = _mm512_sub_ps(_mm512_cvtepi32_ps(c), _mm512_set1_ps(float(w.offset)));
  return (f32)_mm512_maskz_expand_ps(mask, v);
#else
  f32 v = f32{};
  for (int o = 0, i = 0; o < 16; o++)
    if (mask >> o & 1) {
      if (w.value_type == Type::f32) {
        float value;
        std::memcpy(&value, from + 4 * i, 4);
        v[o] = value;
      } else if (w.value_type == Type::bf16) {
        uint32_t bits = uint32_t(from[2 * i] | from[2 * i + 1] << 8) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        v[o] = value;
      } else {
        v[o] = float(from[i]) - float(w.offset);
      }
      i++;
    }
  return v;
#endif
}

template <int rows>
void few_bitmap(const Weight& w, int64_t tile, const Rows& x, int64_t r0, float* y, int64_t ldy) {
  const uint8_t* p = w.data + int64_t(w.start[tile]) * value_bytes(w.value_type);
  const uint16_t* masks = (const uint16_t*)w.index + tile * w.padded();
  f32 part[rows][2] = {};
  for (int64_t k = 0; k < w.inputs; k++) {
    f32 value = bitmap_entries(w, masks[k], p);
    for (int r = 0; r < rows; r++) part[r][k & 1] += value * x.x[(r0 + r) * x.stride + k];
  }
  f32 s = w.scale ? scale_at(w.scale_type, w.scale, 16 * tile) : splat(1.f);
  for (int r = 0; r < rows; r++)
    store_some(y + (r0 + r) * ldy, (part[r][0] + part[r][1]) * s, int(std::min<int64_t>(16, w.outputs - 16 * tile)));
}

// Goes over rows in parts: of 8, 4, 2 and 1 where there are registers for them.
template <class Body>
inline void in_parts(int64_t count, Body body) {
  int64_t r = 0;
#if defined(__AVX512F__)
  for (; r + 8 <= count; r += 8) body.template operator()<8>(r);
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
  for (; r + 4 <= count; r += 4) body.template operator()<4>(r);
#endif
  for (; r + 2 <= count; r += 2) body.template operator()<2>(r);
  for (; r < count; r++) body.template operator()<1>(r);
}

template <int bits>
void few_float_bits(const Weight& w, int64_t tile, const Rows& x, float* y, int64_t ldy) {
  in_parts(x.count, [&]<int rows>(int64_t r) {
    auto run = [&]<int span>() {
      if (bits <= 4 && by_table16(w)) return few_plain<bits, Read::table16, rows, span>(w, tile, x, r, y, ldy);
      if (w.codes == Codes::integer) return few_plain<bits, Read::convert, rows, span>(w, tile, x, r, y, ldy);
#if defined(__AVX512VBMI__)
      if constexpr (bits > 4 && rows <= 2) return few_table256<bits, rows, span>(w, tile, x, r, y, ldy);
      if constexpr (bits > 4)
        for (int i = 0; i < rows; i += 2) few_table256<bits, 2, span>(w, tile, x, r + i, y, ldy);
#else
      if constexpr (bits > 4) few_plain<bits, Read::table256, rows, span>(w, tile, x, r, y, ldy);
#endif
    };
    w.group == 16 ? run.template operator()<4>() : run.template operator()<8>();
  });
}

template <class Body>
inline void with_bits(int bits, Body body) {
  switch (bits) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 3: return body.template operator()<3>();
    case 4: return body.template operator()<4>();
    case 5: return body.template operator()<5>();
    case 6: return body.template operator()<6>();
    case 7: return body.template operator()<7>();
    default: return body.template operator()<8>();
  }
}

void few_float(const Weight& w, int64_t tile, const Rows& x, float* y, int64_t ldy) {
  switch (w.codes) {
    case Codes::bfloat16:
      return in_parts(x.count, [&]<int rows>(int64_t r) { few_bf16<rows>(w, tile, x, r, y, ldy); });
    case Codes::bitmap:
      return in_parts(x.count, [&]<int rows>(int64_t r) { few_bitmap<rows>(w, tile, x, r, y, ldy); });
    case Codes::n_of_m:
      for (int64_t r = 0; r < x.count; r++) {
        int values = 16 * w.n / w.m;
        auto run = [&]<Type type>() {
          if (values == 4) few_n_of_m<type, 4>(w, tile, x, r, y, ldy);
          if (values == 8) few_n_of_m<type, 8>(w, tile, x, r, y, ldy);
          if (values == 12) few_n_of_m<type, 12>(w, tile, x, r, y, ldy);
        };
        if (w.value_type == Type::f32) run.template operator()<Type::f32>();
        if (w.value_type == Type::bf16) run.template operator()<Type::bf16>();
        if (w.value_type == Type::u8) run.template operator()<Type::u8>();
      }
      return;
    default:
      with_bits(w.bits, [&]<int bits>() { few_float_bits<bits>(w, tile, x, y, ldy); });
  }
}

// ------------------------------------------------------------------------------------------------ few rows, int8

inline u32 four_of(const int8_t* q) {
  uint32_t bits;
  std::memcpy(&bits, q, 4);
  return splat_bits(bits);
}

template <int bits, int rows, int span>
void few_int8_plain(const Weight& w, int64_t tile, const Rows& x, int64_t r0, float* y, int64_t ldy) {
  Scratch scratch(w.groups);
  bool shifted = affine(w, tile, true, scratch.scale, scratch.minimum);
  const uint8_t* p = w.data + tile * w.blocks * (bits * 64);
  constexpr int per_block = 8 / span;  // units of a block
  const int64_t units = w.blocks * per_block;
  const int64_t blocks_in_group = std::max<int64_t>(1, w.group / 32);
  const bool one = blocks_in_group == 1;  // a unit is a group
  f32 total[rows] = {};
  int64_t g = 0;
  for (int64_t first = 0; first < w.blocks; first += blocks_in_group) {
    f32 part[rows] = {};
    int64_t last = std::min(w.blocks, first + blocks_in_group);
    for (int64_t b = first; b < last; b++, p += bits * 64) {
      u32 codes[8];
      unpack<bits>(p, codes);
      for (int half = 0; half < per_block; half++) {
        int64_t unit = b * per_block + half;
        f32 s = one ? load<f32>(scratch.scale + 16 * (span < 8 ? unit : g)) : splat(1.f);
        for (int r = 0; r < rows; r++) {
          const int8_t* q = x.q + (r0 + r) * x.width + 32 * b;
          i32 even = i32{} + x.starts[(r0 + r) * units + unit], odd = i32{};
          for (int v = half * span; v < (half + 1) * span; v += 2) {
            even = dot4<bits == 8>(even, codes[v], four_of(q + 4 * v));
            odd = dot4<bits == 8>(odd, codes[v + 1], four_of(q + 4 * v + 4));
          }
          f32 sum = to_f32(even + odd) * x.scale[(r0 + r) * units + unit];
          if (one)
            total[r] += sum * s;
          else
            part[r] += sum;
        }
      }
    }
    if (!one) {
      f32 s = load<f32>(scratch.scale + 16 * g);
      for (int r = 0; r < rows; r++) total[r] += part[r] * s;
    }
    g++;
  }
  if (shifted)
    for (g = 0; g < w.groups; g++)
      for (int r = 0; r < rows; r++) total[r] += load<f32>(scratch.minimum + 16 * g) * x.sums[(r0 + r) * w.groups + g];
  for (int r = 0; r < rows; r++)
    store_some(y + (r0 + r) * ldy, total[r], int(std::min<int64_t>(16, w.outputs - 16 * tile)));
}

void few_int8(const Weight& w, int64_t tile, const Rows& x, float* y, int64_t ldy) {
  with_bits(w.bits, [&]<int bits>() {
    in_parts(x.count, [&]<int rows>(int64_t r) {
      if (w.group == 16)
        few_int8_plain<bits, rows, 4>(w, tile, x, r, y, ldy);
      else
        few_int8_plain<bits, rows, 8>(w, tile, x, r, y, ldy);
    });
  });
}

// ------------------------------------------------------------------------------------------------ many rows

// Rows and tiles whose sums stay in registers: of 32 vectors, or of 16 halves.
#if defined(__AVX512F__)
constexpr int kRows = 12, kTiles = 2;
#else
constexpr int kRows = 6, kTiles = 1;
#endif

// y[rows, 16 tiles] (+)= a[rows, depth] @ b[tiles, depth, 16].
template <int rows, int tiles>
inline void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, f32 (&acc)[rows][tiles]) {
  for (int64_t k = 0; k < depth; k++) {
    f32 v[tiles];
    for (int t = 0; t < tiles; t++) v[t] = load<f32>(b + t * ldb + 16 * k);
    for (int r = 0; r < rows; r++) {
      f32 x = splat(a[r * lda + k]);
      for (int t = 0; t < tiles; t++) acc[r][t] += x * v[t];
    }
  }
}

// A dense tile in float32, [padded inputs, 16].
void dense_tile(const Weight& w, int64_t tile, float* out) {
  int64_t depth = w.padded();
  if (w.codes == Codes::bfloat16) {
    const uint8_t* p = w.data + tile * w.blocks * 1024;
    for (int64_t k = 0; k < depth; k += 2, p += 64) {
      u32 pair = load<u32>(p);
      store(out + 16 * k, as_f32(pair << 16));
      store(out + 16 * k + 16, as_f32(pair & 0xffff0000u));
    }
    return;
  }
  if (w.codes == Codes::n_of_m) {
    const Window at(w);
    std::memset(out, 0, depth * 64);
    f32 s = w.scale ? scale_at(w.scale_type, w.scale, 16 * tile) : splat(1.f);
    int64_t windows = depth / 16;
    for (int64_t i = 0; i < windows; i++) {
      const uint8_t* p = w.data + (tile * windows + i) * at.bytes;
      u32 index = at.index(w.index + (tile * windows + i) * at.index_bytes);
      for (int j = 0; j < at.values; j++) {
        u32 where = ((index >> (at.bits * j)) & uint32_t(w.m - 1)) | uint32_t(j / w.n * w.m);
        f32 value = sparse_value(w, p, j) * s;
        for (int o = 0; o < 16; o++) out[(16 * i + where[o]) * 16 + o] += value[o];  // unused slots hold zeros
      }
    }
    return;
  }
  if (w.codes == Codes::bitmap) {
    const uint8_t* p = w.data + int64_t(w.start[tile]) * value_bytes(w.value_type);
    const uint16_t* masks = (const uint16_t*)w.index + tile * depth;
    f32 s = w.scale ? scale_at(w.scale_type, w.scale, 16 * tile) : splat(1.f);
    for (int64_t k = 0; k < w.inputs; k++) store(out + 16 * k, bitmap_entries(w, masks[k], p) * s);
    std::memset(out + 16 * w.inputs, 0, (depth - w.inputs) * 64);
    return;
  }
  Scratch scratch(w.groups);
  bool centered = by_table16(w) || w.codes == Codes::table;
  affine(w, tile, centered, scratch.scale, scratch.minimum);
  const f32 table = by_table16(w) ? table16(w) : f32{};
  with_bits(w.bits, [&]<int bits>() {
    const uint8_t* p = w.data + tile * w.blocks * (bits * 64);
    for (int64_t b = 0; b < w.blocks; b++, p += bits * 64) {
      u32 codes[8];
      unpack<bits>(p, codes);
      for (int v = 0; v < 8; v++) {
        int64_t g = (32 * b + 4 * v) / w.group;
        f32 s = load<f32>(scratch.scale + 16 * g), m = load<f32>(scratch.minimum + 16 * g);
        for (int i = 0; i < 4; i++) {
          u32 code = (codes[v] >> (8 * i)) & 0xffu;
          f32 value;
          if (by_table16(w)) {
            value = lookup16(table, code);
          } else if (w.codes == Codes::integer) {
            value = to_f32(code);
          } else {
            for (int o = 0; o < 16; o++) value[o] = w.table[code[o]];
          }
          store(out + 16 * (32 * b + 4 * v + i), value * s + m);
        }
      }
    }
  });
}

template <int rows, int tiles>
inline void finish(f32 (&acc)[rows][tiles], float* y, int64_t ldy, int64_t outputs) {
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tiles; t++) {
      int64_t left = outputs - 16 * t;
      if (left >= 16)
        store(y + r * ldy + 16 * t, acc[r][t]);
      else if (left > 0)
        store_some(y + r * ldy + 16 * t, acc[r][t], int(left));
    }
}

// Rows in parts of `most` and what is left over.
template <int most, class Body>
inline void in_blocks(int64_t count, Body body) {
  int64_t r = 0;
  for (; r + most <= count; r += most) body.template operator()<most>(r);
  for (; r + 4 <= count; r += 4) body.template operator()<4>(r);
  for (; r < count; r++) body.template operator()<1>(r);
}

// body.operator()<n>(t) over tiles, as many at a time as there are registers for.
template <class Body>
inline void in_tiles(int tiles, Body body) {
  int t = 0;
  for (; t + kTiles <= tiles; t += kTiles) body.template operator()<kTiles>(t);
  for (; t < tiles; t++) body.template operator()<1>(t);
}

void many_float(const Weight& w, int64_t tile, int tiles, const Rows& x, float* y, int64_t ldy, void* scratch) {
  float* dense = (float*)scratch;
  int64_t depth = w.padded(), outputs = w.outputs - 16 * tile;
  for (int t = 0; t < tiles; t++) dense_tile(w, tile + t, dense + t * depth * 16);
  in_tiles(tiles, [&]<int n>(int t) {
    in_blocks<kRows>(x.count, [&]<int rows>(int64_t r) {
      f32 acc[rows][n] = {};
      multiply<rows, n>(x.x + r * x.stride, x.stride, dense + t * depth * 16, depth * 16, depth, acc);
      finish<rows, n>(acc, y + r * ldy + 16 * t, ldy, outputs - 16 * t);
    });
  });
}

void many_bf16(const Weight& w, int64_t tile, int tiles, const Rows& x, float* y, int64_t ldy, void* scratch) {
  int64_t depth = w.padded(), outputs = w.outputs - 16 * tile;
  const uint8_t* pairs = w.data + tile * depth * 32;
  if (w.codes != Codes::bfloat16) {
    float* dense = (float*)scratch;
    uint16_t* to = (uint16_t*)(dense + depth * 16);
    pairs = (const uint8_t*)to;
    for (int t = 0; t < tiles; t++, to += depth * 16) {
      dense_tile(w, tile + t, dense);
      for (int64_t k = 0; k < depth; k += 2) {
        u32 even = widen(to_bf16(load<f32>(dense + 16 * k))), odd = widen(to_bf16(load<f32>(dense + 16 * k + 16)));
        store(to + 16 * k, even | odd << 16);
      }
    }
  }
  in_tiles(tiles, [&]<int n>(int first) {
    in_blocks<kRows>(x.count, [&]<int rows>(int64_t r) {
      f32 acc[rows][n] = {};
      const uint16_t* a = x.bf16 + r * x.width;
      const uint8_t* b = pairs + first * depth * 32;
      for (int64_t k = 0; k < depth; k += 2) {
        u32 v[n];
        for (int t = 0; t < n; t++) v[t] = load<u32>(b + t * depth * 32 + 32 * k);
        for (int i = 0; i < rows; i++) {
          uint32_t pair;
          std::memcpy(&pair, a + i * x.width + k, 4);
          for (int t = 0; t < n; t++) acc[i][t] = dot2(acc[i][t], v[t], splat_bits(pair));
        }
      }
      finish<rows, n>(acc, y + r * ldy + 16 * first, ldy, outputs - 16 * first);
    });
  });
}

template <int rows, int tiles, bool wide>
inline void int8_block(
    const Weight& w, const uint8_t* codes, const Rows& x, int64_t r, const float* scales, const float* minima,
    bool shifted, float* y, int64_t ldy, int64_t outputs, const uint8_t* ahead) {
  const int64_t depth = w.padded(), per_tile = 16 * w.groups, unit = x.unit, units = (depth + unit - 1) / unit;
  const int64_t in_group = w.groups == 1 ? units : w.group / unit, step = w.unit(), lines = tiles * w.bits * step / 32;
  f32 total[rows][tiles] = {};
  const int8_t* q = x.q + r * x.width;
  const int32_t* starts = x.starts + r * units;
  const float* activations = x.scale + r * units;
  for (int64_t u = 0, g = 0, left = in_group; u < units; u++) {
    i32 acc[rows][tiles];
    for (int i = 0; i < rows; i++) {
      i32 start = i32{} + starts[i * units + u];
      for (int t = 0; t < tiles; t++) acc[i][t] = start;
    }
    for (int64_t from = u * unit, end = std::min(depth, from + unit); from < end; from += step) {
      if (ahead)  // the tiles that come next, to L2 while these are multiplied: fetches to L1 would use up its miss buffers
        for (int64_t line = 0; line < lines; line++) __builtin_prefetch(ahead + (from / step * lines + line) * 64, 0, 2);
      for (int64_t k = from; k < from + step; k += 4) {
        u32 v[tiles];
        for (int t = 0; t < tiles; t++) v[t] = load<u32>(codes + t * depth * 16 + 16 * k);
        for (int i = 0; i < rows; i++) {
          u32 a = four_of(q + i * x.width + k);
          for (int t = 0; t < tiles; t++) acc[i][t] = dot4<wide>(acc[i][t], v[t], a);
        }
      }
    }
    for (int t = 0; t < tiles; t++) {
      f32 s = load<f32>(scales + t * per_tile + 16 * g);
      for (int i = 0; i < rows; i++) total[i][t] += to_f32(acc[i][t]) * (s * activations[i * units + u]);
    }
    if (--left == 0) g++, left = in_group;
  }
  for (int t = 0; t < tiles; t++) {
    if (shifted)
      for (int64_t g = 0; g < w.groups; g++) {
        f32 m = load<f32>(minima + t * per_tile + 16 * g);
        for (int i = 0; i < rows; i++) total[i][t] += m * x.sums[(r + i) * w.groups + g];
      }
  }
  finish<rows, tiles>(total, y + r * ldy, ldy, outputs);
}

// Rows in parts of 6 or 8 where there are registers for them, and what is left over in parts of 4, 2 and 1.
template <class Body>
inline void in_sixes(int64_t count, Body body) {
  int64_t r = 0;
#if defined(__AVX512F__)
  for (; count - r >= 6 && count - r != 8; r += 6) body.template operator()<6>(r);
  if (count - r == 8) return body.template operator()<8>(r);
#endif
  for (; count - r >= 4; r += 4) body.template operator()<4>(r);
  for (; count - r >= 2; r += 2) body.template operator()<2>(r);
  if (r < count) body.template operator()<1>(r);
}

void many_int8(const Weight& w, int64_t tile, int tiles, const Rows& x, float* y, int64_t ldy, void* scratch) {
  int64_t depth = w.padded(), outputs = w.outputs - 16 * tile;
  float* scales = (float*)scratch;
  float* minima = scales + 2 * 16 * w.groups;
  uint8_t* unpacked = (uint8_t*)(minima + 2 * 16 * w.groups);
  bool shifted = false;
  for (int t = 0; t < tiles; t++)
    shifted |= affine(w, tile + t, true, scales + t * 16 * w.groups, minima + t * 16 * w.groups);
  const uint8_t* codes = w.data + tile * depth * 16;
  if (w.bits != 8) {
    codes = unpacked;
    with_bits(w.bits, [&]<int bits>() {
      const uint8_t* p = w.data + tile * w.blocks * (bits * 64);
      for (int64_t b = 0; b < tiles * w.blocks; b++, p += bits * 64) {
        u32 c[8];
        unpack<bits>(p, c);
        for (int v = 0; v < 8; v++) store(unpacked + 512 * b + 64 * v, c[v]);
      }
    });
  }
  const uint8_t* next = w.data + (tile + tiles) * w.blocks * (w.bits * 64);
  auto run = [&]<int n, bool wide>(int t) {
    const uint8_t* c = codes + t * depth * 16;
    const float *s = scales + t * 16 * w.groups, *m = minima + t * 16 * w.groups;
    in_sixes(x.count, [&]<int rows>(int64_t r) {
      const uint8_t* ahead = r ? nullptr : next + t * w.blocks * (w.bits * 64);
      float* to = y + 16 * t;
      int8_block<rows, n, wide>(w, c, x, r, s, m, shifted, to, ldy, outputs - 16 * t, ahead);
    });
  };
  in_tiles(tiles, [&]<int n>(int t) {
    w.bits == 8 ? run.template operator()<n, true>(t) : run.template operator()<n, false>(t);
  });
}

void row(const Weight& w, int64_t output, float* y) {
  int64_t tile = output / 16, depth = w.padded();
  int lane = int(output % 16);
  if (!w.plain()) {
    thread_local float* dense = nullptr;
    thread_local int64_t size = 0;
    if (size < depth * 16) {
      delete[] dense;
      dense = new float[size = depth * 16];
    }
    dense_tile(w, tile, dense);
    for (int64_t k = 0; k < depth; k++) y[k] = dense[16 * k + lane];
    return;
  }
  Scratch scratch(w.groups);
  affine(w, tile, w.codes == Codes::table, scratch.scale, scratch.minimum);
  with_bits(w.bits, [&]<int bits>() {
    const uint8_t* p = w.data + tile * w.blocks * (bits * 64);
    for (int64_t b = 0; b < w.blocks; b++, p += bits * 64)
      for (int k = 0; k < 32; k++) {
        int code = 0, shift = 0;
        const uint8_t* plane = p;
        for (int width : {8, 4, 2, 1}) {
          if (!(bits & width)) continue;
          int fields = 8 / width, v = k / 4;
          code |= (plane[64 * (v / fields) + 4 * lane + k % 4] >> (width * (v % fields)) & ((1 << width) - 1)) << shift;
          shift += width, plane += 64 * width;
        }
        int64_t g = (32 * b + k) / w.group;
        float value = w.codes == Codes::table ? w.table[code] : float(code);
        y[32 * b + k] = value * scratch.scale[16 * g + lane] + scratch.minimum[16 * g + lane];
      }
  });
}

// ------------------------------------------------------------------------------------------------ activations

float quantize(const float* x, int64_t n, int8_t* q) {
  f32 most = f32{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) most = max(most, abs(load<f32>(x + i)));
  float amax = largest(most);
  for (; i < n; i++) amax = std::max(amax, std::fabs(x[i]));
  // A NaN anywhere must come out as NaN; the sum has it where the maximum may not.
  f32 total = f32{};
  for (i = 0; i + 16 <= n; i += 16) total += load<f32>(x + i) * 0.f;
  float poison = sum(total);
  for (; i < n; i++) poison += x[i] * 0.f;
  float scale = amax > 0 ? amax / 127.f : 1.f;
  if (!(poison == 0)) {
    std::memset(q, 0, n);
    if (n) q[0] = 1;
    return std::nanf("");
  }
  float inverse = amax > 0 ? 127.f / amax : 0.f;
  for (i = 0; i + 16 <= n; i += 16) {
    i32 v = round_to_int(load<f32>(x + i) * inverse);
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)(q + i), _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int j = 0; j < 16; j++) q[i + j] = int8_t(v[j]);
#endif
  }
  for (; i < n; i++) q[i] = int8_t(std::nearbyint(x[i] * inverse));
  return scale;
}

void bf16_row(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, to_bf16(load<f32>(x + i)));
  for (; i < n; i++) y[i] = to_bf16(x[i]);
}

void quantize_units(const float* x, int64_t n, int64_t unit, int8_t* q, float* scale, int32_t* sums) {
#if defined(__AVX512F__)
  if (unit == 32) {
    for (int64_t u = 0, i = 0; i < n; u++, i += 32) {
      __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + 16);
      float amax = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
      bool nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q);
      if (nan || !(amax <= std::numeric_limits<float>::max())) {
        scale[u] = quantize(x + i, 32, q + i), sums[u] = 1;
        continue;
      }
      scale[u] = amax > 0 ? amax / 127.f : 1.f;
      __m512 inverse = _mm512_set1_ps(amax > 0 ? 127.f / amax : 0.f);
      __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), d = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
      _mm_storeu_si128((__m128i*)(q + i), _mm512_cvtepi32_epi8(c));
      _mm_storeu_si128((__m128i*)(q + i + 16), _mm512_cvtepi32_epi8(d));
      sums[u] = _mm512_reduce_add_epi32(_mm512_add_epi32(c, d));
    }
    return;
  }
#endif
  for (int64_t u = 0, i = 0; i < n; u++, i += unit) {
    scale[u] = quantize(x + i, unit, q + i);
    int32_t total = 0;
    for (int64_t j = i; j < i + unit; j++) total += q[j];
    sums[u] = total;
  }
}

void quantize_token(const float* x, int64_t n, int64_t unit, int8_t* q, float* scale, int32_t* sums) {
  float one = quantize(x, n, q);
  for (int64_t u = 0, i = 0; i < n; u++, i += unit) {
    int32_t total = 0;
    for (int64_t j = i; j < std::min(n, i + unit); j++) total += q[j];
    scale[u] = one, sums[u] = total;
  }
}

void group_sums(const float* x, int64_t n, int64_t group, float* sums) {
  for (int64_t g = 0, k = 0; k < n; g++, k += group) {
    int64_t end = std::min(n, k + group), i = k;
    f32 total = f32{};
    for (; i + 16 <= end; i += 16) total += load<f32>(x + i);
    float s = sum(total);
    for (; i < end; i++) s += x[i];
    sums[g] = s;
  }
}

void rms_norm(const float* x, const float* scale, float epsilon, int64_t n, float* y) {
  f32 squares = f32{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    f32 v = load<f32>(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < n; i++) total += x[i] * x[i];
  float factor = 1.f / std::sqrt(total / float(n) + epsilon);
  for (i = 0; i + 16 <= n; i += 16) store(y + i, load<f32>(x + i) * factor * load<f32>(scale + i));
  for (; i < n; i++) y[i] = x[i] * factor * scale[i];
}

inline f32 silu(f32 v) {  // v * sigmoid(v), through exp of what is never positive
  f32 e = exponential(-abs(v));
  return v * select((u32)(v < f32{}), e, splat(1.f)) / (e + 1.f);
}

int64_t argmax(const float* x, int64_t n) {  // the first of the largest; the first NaN if there is one
  f32 most = splat(-INFINITY), poison = f32{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    f32 v = load<f32>(x + i);
    most = max(most, v);
    poison += v - v;  // NaN for NaN, and for infinities, which the search below tells apart
  }
  float top = largest(most);
  bool odd = !(sum(poison) == 0);
  for (; i < n; i++) {
    if (x[i] > top) top = x[i];
    odd |= !(x[i] - x[i] == 0);
  }
  if (odd) {
    int64_t best = 0;
    for (i = 0; i < n; i++) {
      if (std::isnan(x[i])) return i;
      if (x[i] > x[best]) best = i;
    }
    return best;
  }
  for (i = 0; i + 64 <= n; i += 64) {
    u32 found = u32{};
    for (int j = 0; j < 64; j += 16) found |= (u32)(load<f32>(x + i + j) == top);
    if (sum(as_f32(found & 0x3f800000u)) != 0) break;
  }
  for (; i < n; i++)
    if (x[i] == top) return i;
  return 0;
}

void sparse_row(const float* x, const float* w, int64_t inputs, int64_t stride, int64_t n, float* y) {
  constexpr int kTogether = 8;  // rows added in one pass over y
  std::fill(y, y + n, 0.f);
  const float* rows[kTogether];
  float factors[kTogether];
  for (int64_t i = 0; i < inputs;) {
    int found = 0;
    for (; i < inputs && found < kTogether; i++)
      if (x[i] != 0.f) rows[found] = w + i * stride, factors[found++] = x[i];  // NaN too
    int64_t j = 0;
    if (found == kTogether)
      for (; j + 16 <= n; j += 16) {
        f32 even = load<f32>(y + j), odd = f32{};
        for (int k = 0; k < kTogether; k += 2) {
          even += load<f32>(rows[k] + j) * factors[k];
          odd += load<f32>(rows[k + 1] + j) * factors[k + 1];
        }
        store(y + j, even + odd);
      }
    for (; j < n; j++)
      for (int k = 0; k < found; k++) y[j] += rows[k][j] * factors[k];
  }
}

void gated_silu(const float* gate, const float* up, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, silu(load<f32>(gate + i)) * load<f32>(up + i));
  if (i < n) {
    f32 g = f32{}, u = f32{};
    std::memcpy(&g, gate + i, (n - i) * 4), std::memcpy(&u, up + i, (n - i) * 4);
    store_some(y + i, silu(g) * u, int(n - i));
  }
}

void rotate(const float* x, const float* cos, const float* sin, float factor, int64_t head, float* y) {
  int64_t half = head / 2;
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[half + i];
    y[i] = (a * cos[i] - b * sin[i]) * factor;
    y[half + i] = (b * cos[i] + a * sin[i]) * factor;
  }
}

// ------------------------------------------------------------------------------------------------ attention

void append(const Cache& c, int64_t head, int64_t row, const float* x) {
  if (c.type == Type::f32) {
    std::memcpy((float*)c.data + row * head, x, head * 4);
  } else if (c.type == Type::bf16) {
    bf16_row(x, head, (uint16_t*)c.data + row * head);
  } else if (c.type == Type::u8) {
    c.scale[row] = quantize(x, head, (int8_t*)c.data + row * head);
  } else {
    float low = x[0], high = x[0], poison = 0;
    for (int64_t i = 0; i < head; i++) low = std::min(low, x[i]), high = std::max(high, x[i]), poison += x[i] * 0.f;
    float scale = (high - low) / 15.f;
    if (!(scale > 0)) scale = 1.f;
    if (!(poison == 0)) scale = low = std::nanf("");
    uint8_t* to = (uint8_t*)c.data + row * head / 2;
    auto code = [&](float v) { return poison == 0 ? int(std::nearbyint((v - low) / scale)) : 0; };
    for (int64_t i = 0; i < head / 2; i++) to[i] = uint8_t(code(x[i]) | code(x[head / 2 + i]) << 4);
    c.scale[2 * row] = scale, c.scale[2 * row + 1] = low;
  }
}

void append_group(const Cache& c, int64_t head, int64_t row, const float* x) {
  uint16_t* scales = c.channel + row / c.group * 2 * head;
  float low[16], scale[16], rows[2][16];
  for (int64_t d = 0; d < head; d += 16) {
    f32 least = load<f32>(x + d), most = least;
    for (int64_t i = 1; i < c.group; i++) {
      f32 v = load<f32>(x + i * head + d);
      for (int j = 0; j < 16; j++) least[j] = v[j] < least[j] ? v[j] : least[j], most[j] = v[j] > most[j] ? v[j] : most[j];
      for (int j = 0; j < 16; j++)
        if (std::isnan(v[j])) least[j] = most[j] = v[j];
    }
    store(low, least);
    bf16_row(low, 16, scales + head + d);
    f32 minimum = bf16_to_f32(scales + head + d), step = (most - minimum) / 15.f;
    store(scale, step);
    for (float& v : scale)
      if (v <= 0) v = 1.f;  // a NaN stays one
    bf16_row(scale, 16, scales + d);
    f32 by = bf16_to_f32(scales + d);
    store(rows[0], minimum), store(rows[1], by);
    for (int64_t i = 0; i < c.group; i++) {
      uint8_t* to = (uint8_t*)c.data + (row + i) * head / 2 + d % (head / 2);
      for (int j = 0; j < 16; j++) {
        float code = std::nearbyint((x[i * head + d + j] - rows[0][j]) / rows[1][j]);
        uint8_t bits = code > 0 ? uint8_t(std::min(code, 15.f)) : 0;
        to[j] = d < head / 2 ? bits : uint8_t(to[j] | bits << 4);
      }
    }
  }
}

constexpr int kKeys = 64;   // keys that are scored together
constexpr int kQueries = 6;  // rows of a register tile

// [16 keys, head] to [head, 16 keys].
inline void transpose16(const float* from, int64_t head, float* to) {
#if defined(__AVX512F__)
  for (int64_t d = 0; d < head; d += 16) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * head + d);
    for (int i = 0; i < 16; i += 2)
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + j], (__m512d)t[i + 2 + j]);
        r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + j], (__m512d)t[i + 2 + j]);
      }
    for (int i = 0; i < 4; i++) {  // r[i], r[i+4], r[i+8], r[i+12] hold column i + 4 L in 128-bit lane L
      __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      __m512 c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88), e = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
      _mm512_storeu_ps(to + (d + i) * 16, _mm512_shuffle_f32x4(a, c, 0x88));
      _mm512_storeu_ps(to + (d + i + 4) * 16, _mm512_shuffle_f32x4(b, e, 0x88));
      _mm512_storeu_ps(to + (d + i + 8) * 16, _mm512_shuffle_f32x4(a, c, 0xdd));
      _mm512_storeu_ps(to + (d + i + 12) * 16, _mm512_shuffle_f32x4(b, e, 0xdd));
    }
  }
#else
  for (int i = 0; i < 16; i++)
    for (int64_t d = 0; d < head; d++) to[d * 16 + i] = from[i * head + d];
#endif
}

int64_t attend_scratch(int64_t head, int64_t rows) { return 3 * kKeys * head + rows * kKeys; }

// Sixteen values of an entry as float32; of int8 codes, and of bare 4-bit ones, without their scale.
template <Type type, bool bare = false>
inline f32 part_of_entry(const Cache& c, int64_t head, int64_t row, int64_t d) {
  if constexpr (type == Type::f32) return load<f32>((const float*)c.data + row * head + d);
  if constexpr (type == Type::bf16) return bf16_to_f32((const uint16_t*)c.data + row * head + d);
  if constexpr (type == Type::u8) {
    return to_f32(widen(load<i8x16>((const int8_t*)c.data + row * head + d)));
  }
  int64_t half = head / 2;
  u32 codes = widen(load<u8x16>((const uint8_t*)c.data + row * half + d % half));
  f32 values = to_f32(d < half ? codes & 15u : codes >> 4);
  return bare ? values : values * c.scale[2 * row] + c.scale[2 * row + 1];
}

// Of four vectors: lane 4 L + i of the result is the sum of v[i] over its 128-bit lane L.
inline f32 quarter_sums(const f32 (&v)[4]) {
#if defined(__AVX512F__)
  __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return (f32)_mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
#else
  f32 s;
  for (int lane = 0; lane < 4; lane++)
    for (int i = 0; i < 4; i++) {
      const int at = 4 * lane;
      s[at + i] = (v[i][at] + v[i][at + 2]) + (v[i][at + 1] + v[i][at + 3]);
    }
  return s;
#endif
}

// The sums of sixteen vectors, from the quarter sums of each four.
inline f32 sums_of(const f32 (&q)[4]) {
#if defined(__AVX512F__)
  __m512 a = (__m512)q[0], b = (__m512)q[1], c = (__m512)q[2], d = (__m512)q[3];
  __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  return (f32)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
#else
  f32 s;
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 4; i++) s[4 * j + i] = (q[j][i] + q[j][8 + i]) + (q[j][4 + i] + q[j][12 + i]);
  return s;
#endif
}

// Scores of `rows` queries against keys [first, first + n), n at most kKeys; each key is read once. The queries stay
// in registers where a head is `chunks` vectors; 0 reads them again for each key.
template <Type type, int rows, int chunks, bool bare = false>
inline void few_scores(const Cache& c, int64_t head, int64_t first, int64_t n, const float* q, float* scores) {
  f32 query[rows][std::max(1, chunks)];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < chunks; j++) query[r][j] = load<f32>(q + r * head + 16 * j);
  for (int64_t s = 0; s < n; s += 16) {
    f32 quarters[rows][4] = {};
    int64_t keys = std::min<int64_t>(16, n - s);
    for (int64_t four = 0; four < keys; four += 4) {
      f32 acc[rows][4] = {};
      for (int64_t i = 0; i < 4; i++) {
        int64_t row = first + s + std::min(four + i, keys - 1);  // past the end: one that is there, not to be looked at
        for (int64_t j = 0; j < (chunks ? chunks : head / 16); j++) {
          f32 k = part_of_entry<type, bare>(c, head, row, 16 * j);
          for (int r = 0; r < rows; r++) acc[r][i] += k * (chunks ? query[r][j] : load<f32>(q + r * head + 16 * j));
        }
      }
      for (int r = 0; r < rows; r++) quarters[r][four / 4] = quarter_sums(acc[r]);
    }
    f32 scale = splat(1.f);
    if constexpr (type == Type::u8) std::memcpy(&scale, c.scale + first + s, keys * 4);
    for (int r = 0; r < rows; r++) store(scores + r * kKeys + s, sums_of(quarters[r]) * scale);
  }
}

// The same against 4-bit codes with a scale and a minimum for each channel of a group of keys: the query takes them.
template <int rows, int chunks>
inline void few_scores_by_channel(const Cache& c, int64_t head, int64_t first, int64_t n, const float* q, float* scores,
                                  float* scaled) {
  for (int64_t s = 0, part; s < n; s += part) {
    int64_t group = (first + s) / c.group;
    part = std::min(n - s, (group + 1) * c.group - first - s);
    const uint16_t* by = c.channel + group * 2 * head;
    float bias[rows];
    for (int r = 0; r < rows; r++) {
      f32 add = f32{};
      for (int64_t d = 0; d < head; d += 16) {
        f32 query = load<f32>(q + r * head + d);
        store(scaled + r * head + d, query * bf16_to_f32(by + d));
        add += query * bf16_to_f32(by + head + d);
      }
      bias[r] = sum(add);
    }
    few_scores<Type::none, rows, chunks, true>(c, head, first + s, part, scaled, scores + s);
    for (int r = 0; r < rows; r++)
      for (int64_t i = s; i < s + part; i += 16) store(scores + r * kKeys + i, load<f32>(scores + r * kKeys + i) + bias[r]);
  }
}

// Adds weighted values [first, first + n) to `out`.
template <Type type, int rows>
inline void few_values(const Cache& c, int64_t head, int64_t first, int64_t n, float* weights, float* out) {
  if constexpr (type == Type::u8)
    for (int r = 0; r < rows; r++)
      for (int64_t s = 0; s < n; s++) weights[r * kKeys + s] *= c.scale[first + s];
  auto run = [&]<int parts>(int64_t d) {
    f32 acc[rows][parts];
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < parts; j++) acc[r][j] = load<f32>(out + r * head + d + 16 * j);
    for (int64_t s = 0; s < n; s++) {
      f32 v[parts];
      for (int j = 0; j < parts; j++) v[j] = part_of_entry<type>(c, head, first + s, d + 16 * j);
      for (int r = 0; r < rows; r++) {
        f32 p = splat(weights[r * kKeys + s]);
        for (int j = 0; j < parts; j++) acc[r][j] += p * v[j];
      }
    }
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < parts; j++) store(out + r * head + d + 16 * j, acc[r][j]);
  };
  int64_t d = 0;
  for (; d + 64 <= head; d += 64) run.template operator()<4>(d);
  for (; d < head; d += 16) run.template operator()<1>(d);
}

template <class Body>
inline void with_type(Type type, Body body) {
  if (type == Type::f32) return body.template operator()<Type::f32>();
  if (type == Type::bf16) return body.template operator()<Type::bf16>();
  if (type == Type::u8) return body.template operator()<Type::u8>();
  body.template operator()<Type::none>();
}

// A key or value in float32.
inline void read_entry(const Cache& c, int64_t head, int64_t row, float* out) {
  if (c.group) {
    const uint16_t* by = c.channel + row / c.group * 2 * head;
    for (int64_t d = 0; d < head; d += 16)
      store(out + d, part_of_entry<Type::none, true>(c, head, row, d) * bf16_to_f32(by + d) + bf16_to_f32(by + head + d));
    return;
  }
  with_type(c.type, [&]<Type type>() {
    float s = type == Type::u8 ? c.scale[row] : 1.f;
    for (int64_t d = 0; d < head; d += 16) store(out + d, part_of_entry<type>(c, head, row, d) * s);
  });
}

// body.operator()<rows>(r) over rows in parts of 4, 3, 2 and 1.
template <class Body>
inline void few_rows(int64_t count, Body body) {
  int64_t r = 0;
  for (; count - r >= 4; r += 4) body.template operator()<4>(r);
  if (count - r == 3) return body.template operator()<3>(r);
  if (count - r == 2) return body.template operator()<2>(r);
  if (count - r == 1) body.template operator()<1>(r);
}

constexpr int64_t kFewQueries = 8;  // rows up to which keys and values are not copied out of the cache

// Softmax of a block's scores, in place: what a row may not see becomes 0, `out` shrinks to the new maximum.
inline void soften(float* scores, int64_t n, int64_t head, int64_t seen, const uint8_t* real, bool holes, float* out,
                   float& maximum, float& total) {
  int64_t whole = (n + 15) / 16 * 16;
  for (int64_t i = seen; i < whole; i++) scores[i] = -INFINITY;
  if (holes)
    for (int64_t i = 0; i < seen; i++)
      if (!real[i]) scores[i] = -INFINITY;
  f32 most = splat(-INFINITY);
  for (int64_t i = 0; i < whole; i += 16) most = max(most, load<f32>(scores + i));
  float before = maximum, now = std::max(before, largest(most));
  if (now == -INFINITY) {  // nothing to see here, or nothing but NaN
    bool nan = false;
    for (int64_t i = 0; i < seen; i++) nan |= std::isnan(scores[i]);
    for (int64_t i = 0; i < whole; i++) scores[i] = nan ? std::nanf("") : 0.f;
    if (nan) maximum = 0, total = std::nanf("");
    return;
  }
  f32 added = f32{};
  for (int64_t i = 0; i < whole; i += 16) {
    f32 e = exponential(load<f32>(scores + i) - now);
    store(scores + i, e);
    added += e;
  }
  float shrink = before == -INFINITY ? 0.f : before == now ? 1.f : std::exp(before - now);
  total = total * shrink + sum(added);
  maximum = now;
  if (shrink != 1.f)
    for (int64_t d = 0; d < head; d += 16) store(out + d, load<f32>(out + d) * shrink);
}

void attend(const Cache& kc, const Cache& vc, int64_t head, int64_t base, int64_t first, int64_t last, const float* q,
            int64_t rows, const int64_t* limit, const uint8_t* real, float* out, float* maxima, float* sums,
            float* scratch) {
  float* turned = scratch;                  // [4, head, 16]
  float* kept = turned + kKeys * head;      // keys in float32, where the cache holds another type
  float* values = kept + kKeys * head;
  float* scores = values + kKeys * head;    // [rows, kKeys]
  std::memset(out, 0, rows * head * 4);
  int64_t farthest = 0;
  for (int64_t r = 0; r < rows; r++) maxima[r] = -INFINITY, sums[r] = 0, farthest = std::max(farthest, limit[r]);
  last = std::min(last, farthest);
  for (int64_t s0 = first; s0 < last; s0 += kKeys) {
    int64_t n = std::min<int64_t>(kKeys, last - s0), whole = (n + 15) / 16 * 16;
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; i++) tokens += real[s0 + i];
    if (!tokens) continue;
    if (rows <= kFewQueries) {
      with_type(kc.type, [&]<Type type>() {
        few_rows(rows, [&]<int count>(int64_t r) {
          auto run = head == 64 ? few_scores<type, count, 4> : few_scores<type, count, 0>;
          auto grouped = head == 64 ? few_scores_by_channel<count, 4> : few_scores_by_channel<count, 0>;
          if (kc.group)
            grouped(kc, head, base + s0, n, q + r * head, scores + r * kKeys, turned);
          else
            run(kc, head, base + s0, n, q + r * head, scores + r * kKeys);
        });
      });
      for (int64_t r = 0; r < rows; r++)
        soften(scores + r * kKeys, n, head, std::clamp<int64_t>(limit[r] - s0, 0, n), real + s0, tokens < n,
               out + r * head, maxima[r], sums[r]);
      with_type(vc.type, [&]<Type type>() {
        few_rows(rows, [&]<int count>(int64_t r) {
          few_values<type, count>(vc, head, base + s0, n, scores + r * kKeys, out + r * head);
        });
      });
      continue;
    }
    const float* k = (const float*)kc.data + (base + s0) * head;
    const float* v = (const float*)vc.data + (base + s0) * head;
    if (kc.type != Type::f32 || whole > n) {
      for (int64_t i = 0; i < n; i++)
        read_entry(kc, head, base + s0 + i, kept + i * head);
      std::memset(kept + n * head, 0, (whole - n) * head * 4);
      k = kept;
    }
    if (vc.type != Type::f32) {
      for (int64_t i = 0; i < n; i++) read_entry(vc, head, base + s0 + i, values + i * head);
      v = values;
    }
    for (int64_t t = 0; t < whole / 16; t++) transpose16(k + 16 * t * head, head, turned + 16 * t * head);

    auto score = [&]<int count>(int64_t r) {
      in_tiles(int(whole / 16), [&]<int tiles>(int t) {
        f32 acc[count][tiles] = {};
        multiply<count, tiles>(q + r * head, head, turned + 16 * t * head, 16 * head, head, acc);
        for (int i = 0; i < count; i++)
          for (int j = 0; j < tiles; j++) store(scores + (r + i) * kKeys + 16 * (t + j), acc[i][j]);
      });
    };
    int64_t r = 0;
    for (; r + kQueries <= rows; r += kQueries) score.template operator()<kQueries>(r);
    for (; r + 3 <= rows; r += 3) score.template operator()<3>(r);
    for (; r < rows; r++) score.template operator()<1>(r);

    for (r = 0; r < rows; r++)
      soften(scores + r * kKeys, n, head, std::clamp<int64_t>(limit[r] - s0, 0, n), real + s0, tokens < n,
             out + r * head, maxima[r], sums[r]);

    auto mix = [&]<int count>(int64_t row0) {
      in_tiles(int(head / 16), [&]<int tiles>(int tile) {
        const int64_t d = 16 * tile;
        f32 acc[count][tiles];
        for (int i = 0; i < count; i++)
          for (int j = 0; j < tiles; j++) acc[i][j] = load<f32>(out + (row0 + i) * head + d + 16 * j);
        for (int64_t s = 0; s < n; s++) {
          f32 b[tiles];
          for (int j = 0; j < tiles; j++) b[j] = load<f32>(v + s * head + d + 16 * j);
          for (int i = 0; i < count; i++) {
            f32 p = splat(scores[(row0 + i) * kKeys + s]);
            for (int j = 0; j < tiles; j++) acc[i][j] += p * b[j];
          }
        }
        for (int i = 0; i < count; i++)
          for (int j = 0; j < tiles; j++) store(out + (row0 + i) * head + d + 16 * j, acc[i][j]);
      });
    };
    r = 0;
    for (; r + kQueries <= rows; r += kQueries) mix.template operator()<kQueries>(r);
    for (; r + 3 <= rows; r += 3) mix.template operator()<3>(r);
    for (; r < rows; r++) mix.template operator()<1>(r);
  }
}

}  // namespace

const Kernels table = {
    LMC_NAME,       few_float, few_int8,   many_float, many_bf16,  many_int8, row,        quantize,
    quantize_units, quantize_token, bf16_row, group_sums, rms_norm, gated_silu, argmax,   sparse_row,
    rotate,         append,    append_group, attend,   attend_scratch,
};

}  // namespace LMC_ISA
}  // namespace lmc

#define LMC_JOIN2(a, b) a##b
#define LMC_JOIN(a, b) LMC_JOIN2(a, b)
const lmc::Kernels& lmc::LMC_JOIN(LMC_ISA, _kernels)() { return lmc::LMC_ISA::table; }
