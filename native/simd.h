// Vectors of 64 bytes, whatever the instruction set. Where registers have 32, a vector is two of them (a compiler that
// splits vectors itself keeps them in memory); where they have fewer, the compiler splits it.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#define LMC_TWO 1  // a vector is two registers
#else
#define LMC_TWO 0
#endif

namespace lmc {

constexpr int kLanes = 16;  // float32 values in a vector; also the outputs of a tile

#if LMC_TWO
template <class T>
struct Two {
  typedef T Half __attribute__((vector_size(32)));
  Half low, high;

  T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  T operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }
  template <class U>
  explicit operator Two<U>() const {  // the same bits
    return {(typename Two<U>::Half)low, (typename Two<U>::Half)high};
  }
  Two operator-() const { return {-low, -high}; }
  Two operator~() const { return {~low, ~high}; }
};

#define LMC_EACH(op)                                                                                         \
  template <class T>                                                                                         \
  inline Two<T> operator op(Two<T> a, Two<T> b) {                                                            \
    return {a.low op b.low, a.high op b.high};                                                               \
  }                                                                                                          \
  template <class T>                                                                                         \
  inline Two<T> operator op(Two<T> a, std::type_identity_t<T> b) {                                           \
    return {a.low op b, a.high op b};                                                                        \
  }                                                                                                          \
  template <class T>                                                                                         \
  inline Two<T>& operator op##=(Two<T>& a, Two<T> b) {                                                       \
    return a = a op b;                                                                                       \
  }                                                                                                          \
  template <class T>                                                                                         \
  inline Two<T>& operator op##=(Two<T>& a, std::type_identity_t<T> b) {                                      \
    return a = a op b;                                                                                       \
  }
LMC_EACH(+)
LMC_EACH(-)
LMC_EACH(*)
LMC_EACH(/)
LMC_EACH(&)
LMC_EACH(|)
#undef LMC_EACH

template <class T>
inline Two<T> operator<<(Two<T> a, int b) { return {a.low << b, a.high << b}; }
template <class T>
inline Two<T> operator>>(Two<T> a, int b) { return {a.low >> b, a.high >> b}; }
template <class T>
inline Two<T> operator<<(Two<T> a, Two<T> b) { return {a.low << b.low, a.high << b.high}; }

// All bits of a lane where it holds.
template <class T>
inline Two<int32_t> operator<(Two<T> a, Two<T> b) { return {a.low < b.low, a.high < b.high}; }
template <class T>
inline Two<int32_t> operator<(Two<T> a, std::type_identity_t<T> b) { return {a.low < b, a.high < b}; }
template <class T>
inline Two<int32_t> operator>(Two<T> a, std::type_identity_t<T> b) { return {a.low > b, a.high > b}; }
template <class T>
inline Two<int32_t> operator==(Two<T> a, std::type_identity_t<T> b) { return {a.low == b, a.high == b}; }

typedef Two<float> f32;
typedef Two<int32_t> i32;
typedef Two<uint32_t> u32;
#else
typedef float f32 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
#endif
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline void store_some(float* p, f32 v, int n) { std::memcpy(p, &v, sizeof(float) * n); }

inline f32 splat(float x) { return f32{} + x; }
inline u32 splat_bits(uint32_t x) { return u32{} + x; }
inline f32 as_f32(u32 v) { return (f32)v; }
inline u32 as_u32(f32 v) { return (u32)v; }
#if LMC_TWO
template <>
inline f32 load<f32>(const void* p) {
  return {load<f32::Half>(p), load<f32::Half>((const char*)p + 32)};
}
template <>
inline u32 load<u32>(const void* p) {
  return {load<u32::Half>(p), load<u32::Half>((const char*)p + 32)};
}
template <class T>
inline void store(void* p, Two<T> v) {
  store(p, v.low), store((char*)p + 32, v.high);
}
inline f32 to_f32(i32 v) {
  return {__builtin_convertvector(v.low, f32::Half), __builtin_convertvector(v.high, f32::Half)};
}
inline f32 to_f32(u32 v) { return to_f32((i32)v); }  // values below 2**31
inline u32 widen(u8x16 v) {
  __m128i bytes = (__m128i)v;
  return {(u32::Half)_mm256_cvtepu8_epi32(bytes), (u32::Half)_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline i32 widen(i8x16 v) {
  __m128i bytes = (__m128i)v;
  return {(i32::Half)_mm256_cvtepi8_epi32(bytes), (i32::Half)_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
inline u32 widen(u16x16 v) {
  __m256i all = (__m256i)v;
  return {(u32::Half)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(all)),
          (u32::Half)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(all, 1))};
}
inline u16x16 narrow(u32 v) {  // values below 2**16
  return (u16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v.low, (__m256i)v.high), 0xd8);
}
#else
inline f32 to_f32(u32 v) { return __builtin_convertvector((i32)v, f32); }  // values below 2**31
inline f32 to_f32(i32 v) { return __builtin_convertvector(v, f32); }
inline u32 widen(u8x16 v) {
#if defined(__AVX512F__)
  return (u32)_mm512_cvtepu8_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, u32);
#endif
}
inline i32 widen(i8x16 v) {
#if defined(__AVX512F__)
  return (i32)_mm512_cvtepi8_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, i32);
#endif
}
inline u32 widen(u16x16 v) { return __builtin_convertvector(v, u32); }
inline u16x16 narrow(u32 v) { return __builtin_convertvector(v, u16x16); }
#endif

inline f32 max(f32 a, f32 b) {
#if defined(__AVX512F__)
  return (f32)_mm512_max_ps((__m512)a, (__m512)b);
#elif LMC_TWO
  return {(f32::Half)_mm256_max_ps((__m256)a.low, (__m256)b.low), (f32::Half)_mm256_max_ps((__m256)a.high, (__m256)b.high)};
#else
  return a > b ? a : b;
#endif
}

inline f32 abs(f32 v) { return as_f32(as_u32(v) & 0x7fffffffu); }

inline float sum(f32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float t[kLanes], s = 0;
  store(t, v);
  for (int w = kLanes / 2; w; w /= 2)
    for (int i = 0; i < w; i++) t[i] += t[i + w];
  s = t[0];
  return s;
#endif
}

inline float largest(f32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float t[kLanes];
  store(t, v);
  for (int w = kLanes / 2; w; w /= 2)
    for (int i = 0; i < w; i++) t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
  return t[0];
#endif
}

inline i32 round_to_int(f32 v) {  // nearest, ties to even
#if defined(__AVX512F__)
  return (i32)_mm512_cvtps_epi32((__m512)v);
#else
  const f32 magic = splat(12582912.f);  // 1.5 * 2**23: the sum's low bits are the rounded integer
  f32 shifted = v + magic;
  return (i32)shifted - 0x4b400000;
#endif
}

inline f32 bf16_to_f32(const uint16_t* p) { return as_f32(widen(load<u16x16>(p)) << 16); }

inline uint16_t to_bf16(float x) {  // nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline u16x16 to_bf16(f32 v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  return (u16x16)h;
#else
  u32 bits = as_u32(v);
  u32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  u32 nan = (bits >> 16) | 0x40u;
  u32 is_nan = (u32)((bits & 0x7fffffffu) > 0x7f800000u);
  return narrow((rounded & ~is_nan) | (nan & is_nan));
#endif
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float value;
  if (magnitude >= 0x7c00) {
    uint32_t bits = sign | 0x7f800000u | (magnitude & 0x3ff) << 13;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  if (magnitude >= 0x400) {
    uint32_t bits = sign | ((magnitude << 13) + (112u << 23));
    std::memcpy(&value, &bits, 4);
    return value;
  }
  value = float(magnitude) * 5.9604644775390625e-8f;  // 2**-24: subnormal
  return sign ? -value : value;
}

inline f32 f16_to_f32(const uint16_t* p) {
#if defined(__AVX512F__)
  return (f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif LMC_TWO
  return {(f32::Half)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          (f32::Half)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
#else
  f32 v;
  for (int i = 0; i < kLanes; i++) v[i] = half_to_float(p[i]);
  return v;
#endif
}

// acc + for each lane the sum of four products of unsigned codes and signed activations.
// `wide`: codes may exceed 127 (only AVX2 has to know: its 16-bit sums would saturate).
template <bool wide>
inline i32 dot4(i32 acc, u32 codes, u32 x) {
#if defined(__AVX512VNNI__)
  return (i32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#elif LMC_TWO
  auto half = [](__m256i sum, __m256i c, __m256i v) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i seven = wide ? _mm256_and_si256(c, _mm256_set1_epi8(0x7f)) : c;
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(seven, v), ones));
    if (!wide) return sum;
    __m256i top = _mm256_and_si256(_mm256_srli_epi16(c, 7), _mm256_set1_epi8(1));
    return _mm256_add_epi32(sum, _mm256_slli_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(top, v), ones), 7));
  };
  return {(i32::Half)half((__m256i)acc.low, (__m256i)codes.low, (__m256i)x.low),
          (i32::Half)half((__m256i)acc.high, (__m256i)codes.high, (__m256i)x.high)};
#else
  for (int b = 0; b < 4; b++)
    acc += (i32)((codes >> (8 * b)) & 0xffu) * ((i32)(x << (24 - 8 * b)) >> 24);
  return acc;
#endif
}

// acc + for each lane the sum of two bfloat16 products.
inline f32 dot2(f32 acc, u32 w, u32 x) {
#if defined(__AVX512BF16__)
  return (f32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  acc += as_f32(w << 16) * as_f32(x << 16);
  return acc + as_f32(w & 0xffff0000u) * as_f32(x & 0xffff0000u);
#endif
}

// table[index mod 16] in each lane.
inline f32 lookup16(f32 table, u32 index) {
#if defined(__AVX512F__)
  return (f32)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif LMC_TWO
  auto half = [&](__m256i at) {  // a permutation takes the lowest three bits, the fourth says which half of the table
    __m256 first = _mm256_permutevar8x32_ps((__m256)table.low, at);
    __m256 second = _mm256_permutevar8x32_ps((__m256)table.high, at);
    return (f32::Half)_mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  };
  return {half((__m256i)index.low), half((__m256i)index.high)};
#else
  float t[kLanes];
  uint32_t at[kLanes];
  store(t, table), store(at, index);
  f32 v;
  for (int i = 0; i < kLanes; i++) v[i] = t[at[i] & 15];
  return v;
#endif
}

inline f32 select(u32 mask, f32 yes, f32 no) { return as_f32((as_u32(yes) & mask) | (as_u32(no) & ~mask)); }

inline f32 exponential(f32 x) {  // of what is not positive: relative error below 2e-7 down to -87, then 0; NaN stays
  u32 dead = (u32)(x < splat(-87.f));
  x = select(dead, splat(-87.f), x);
  i32 n = round_to_int(x * 1.44269504f);
  f32 k = to_f32(n);
  f32 r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  f32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  u32 power = (u32)(n + 127) << 23;
  return as_f32(as_u32(p * as_f32(power)) & ~dead);
}

}  // namespace lmc
