// What a kernel is given, and the table of kernels that each instruction set fills.
//
// Weights are stored in tiles of 16 outputs. Inputs come in blocks of 32; a block's codes of one bit plane of
// width w are w vectors of 64 bytes, and byte b of lane o in field f of vector j is input 4 * (j * 8 / w + f) + b
// of output o. So a field, masked, is an operand of the dot product of four bytes (VNNI), and the planes of one
// code (3 bits are planes of 2 and 1) meet in the same place.
#pragma once
#include <cstdint>

namespace lmc {

enum class Codes : int64_t {
  integer = 0,   // value = code - offset, or - zero, or * scale + minimum
  table = 1,     // value = table[code]: NF4, FP4, FP8, codebooks
  bfloat16 = 2,  // pairs of inputs side by side
  n_of_m = 3,    // n of m consecutive inputs, values and positions
  bitmap = 4,    // a bit for each entry, values of those that are there
};

enum class Type : int64_t { none = 0, f32 = 1, f16 = 2, bf16 = 3, u8 = 4, e8m0 = 5, e4m3 = 6 };

struct Weight {
  Codes codes;
  int bits = 0;
  int64_t inputs = 0, outputs = 0;
  int64_t blocks = 0;      // of 32 inputs
  int64_t group = 0;       // inputs per scale, padded: a multiple of 32, or 16
  int64_t groups = 0;
  int64_t packed_group = 0;  // inputs per scale as they come; smaller than `group` where groups are padded
  int offset = 0;
  int n = 0, m = 0;        // of n_of_m
  const uint8_t* data = nullptr;
  Type scale_type = Type::none;
  const void* scale = nullptr;      // [tiles, groups, 16]
  const uint8_t* zero = nullptr;    // [tiles, groups, 16]
  const void* minimum = nullptr;    // [tiles, groups, 16], type of the scale
  const float* outer = nullptr;     // scales of scales and their minimums
  int64_t outer_mode = 0;           // 1: one for all; 2: [tiles / 16, groups, 2]; 3: [tiles, outer groups, 2, 16]
  int64_t outer_groups = 0;
  const float* table = nullptr;     // 2**bits entries
  Type value_type = Type::none;     // of sparse values: f32, bf16, or u8 codes
  const uint8_t* index = nullptr;   // positions of n_of_m, or masks of a bitmap, uint16 or uint32
  const uint32_t* start = nullptr;  // of a bitmap: first value of each tile, and the end of the last
  int64_t stored = 0;               // of a bitmap: values in the buffer
  int64_t tiles() const { return (outputs + 15) / 16; }
  int64_t padded() const { return blocks * 32; }
  int64_t unit() const { return group == 16 ? 16 : 32; }  // inputs that share a scale of their activations
  int64_t units() const { return padded() / unit(); }
  // The same where a token has one scale: the most that share a scale of the weight and whose sum fits 32 bits.
  int64_t long_unit() const { return groups == 1 ? 1 << 14 : group <= 1 << 14 ? group : unit(); }
  int code_offset() const { return zero || minimum ? 0 : offset; }
  bool plain() const { return codes == Codes::integer || codes == Codes::table; }
};

// Rows of activations in the forms that kernels read; only those asked for are filled.
struct Rows {
  int64_t count = 0;
  int64_t width = 0;               // padded inputs: the stride of every form
  const float* x = nullptr;        // [count, stride]
  int64_t stride = 0;              // of x alone
  const uint16_t* bf16 = nullptr;  // [count, width]
  const int8_t* q = nullptr;       // [count, width]
  int64_t unit = 32;               // of q: inputs that share an entry of `scale` and of `starts`
  const float* scale = nullptr;    // [count, units]: x = q * scale
  const int32_t* starts = nullptr;  // [count, units]: minus the weight's offset times the sum of q
  const float* sums = nullptr;     // [count, groups]: of x, or of q * scale
};

// A cache of keys or values: [batch, kv heads, slots, head].
struct Cache {
  Type type = Type::f32;  // f32, bf16, u8 (int8 codes), none (two 4-bit codes a byte)
  void* data = nullptr;
  float* scale = nullptr;  // [batch, kv heads, slots, 2]: scale and minimum of 4-bit codes; [.., 1] of int8
  uint16_t* channel = nullptr;  // [batch, kv heads, slots / group, 2, head] bfloat16 instead: of each channel of a group
  int64_t group = 0;            // slots that share a scale of each channel
};

struct Kernels {
  const char* name;
  // Outputs [16 * tile, ..) of all rows into y, for few rows, each code decoded once for up to eight rows.
  void (*few_float)(const Weight&, int64_t tile, const Rows&, float* y, int64_t ldy);
  void (*few_int8)(const Weight&, int64_t tile, const Rows&, float* y, int64_t ldy);
  // The same for many rows: `tiles` (one or two) are decoded once into `scratch`, then multiplied.
  void (*many_float)(const Weight&, int64_t tile, int tiles, const Rows&, float* y, int64_t ldy, void* scratch);
  void (*many_bf16)(const Weight&, int64_t tile, int tiles, const Rows&, float* y, int64_t ldy, void* scratch);
  void (*many_int8)(const Weight&, int64_t tile, int tiles, const Rows&, float* y, int64_t ldy, void* scratch);
  // One output row of a table, decoded: [padded inputs].
  void (*row)(const Weight&, int64_t output, float* y);
  float (*quantize)(const float* x, int64_t n, int8_t* q);  // all of x with one scale, which it returns
  // Codes of x, the sums of each unit's codes and its scale: of its own, or one for all of x.
  void (*quantize_units)(const float* x, int64_t n, int64_t unit, int8_t* q, float* scale, int32_t* sums);
  void (*quantize_token)(const float* x, int64_t n, int64_t unit, int8_t* q, float* scale, int32_t* sums);
  void (*to_bf16)(const float* x, int64_t n, uint16_t* y);
  void (*group_sums)(const float* x, int64_t n, int64_t group, float* sums);
  void (*rms_norm)(const float* x, const float* scale, float epsilon, int64_t n, float* y);
  void (*gated_silu)(const float* gate, const float* up, int64_t n, float* y);
  int64_t (*argmax)(const float* x, int64_t n);
  // y[n] = x[inputs] @ w[inputs, n] (rows `stride` apart), reading the rows of w whose x is not 0.
  void (*sparse_row)(const float* x, const float* w, int64_t inputs, int64_t stride, int64_t n, float* y);
  void (*rotate)(const float* x, const float* cos, const float* sin, float factor, int64_t head, float* y);
  void (*append)(const Cache&, int64_t head, int64_t row, const float* x);
  // Codes of `group` keys `x: [group, head]`, each channel with a scale, as entries from `row` on.
  void (*append_group)(const Cache&, int64_t head, int64_t row, const float* x);
  // Attention of `rows` queries over keys [first, last): writes out[rows, head] unnormalized, with the maximum and
  // the sum of each row. `limit[r]` is the first slot that row r may not see; `real` marks slots that hold tokens.
  void (*attend)(const Cache& k, const Cache& v, int64_t head, int64_t base, int64_t first, int64_t last,
                 const float* q, int64_t rows, const int64_t* limit, const uint8_t* real, float* out, float* maxima,
                 float* sums, float* scratch);
  int64_t (*attend_scratch)(int64_t head, int64_t rows);
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif
const Kernels& kernels();  // the best that this CPU runs, or what LMCOMPRESS_ISA names

}  // namespace lmc
