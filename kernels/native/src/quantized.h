// Products with matrices of 8 or 4 bits and a scale for each block of inputs.
#ifndef MOESAIC_QUANTIZED_H_
#define MOESAIC_QUANTIZED_H_

#include <cstdint>

namespace moesaic {

// Outputs that a panel of packed weights holds side by side, and inputs of one byte group: a panel
// is [inputs / 4][16 outputs][4 inputs] bytes for 8 bits; for 4 bits [inputs / 8][16 outputs][4
// bytes], where a byte's low nibble belongs to the first four inputs, its high one to the last.
// kernels/quantize/packing.py calls this order "panels".
constexpr int64_t kPanelOutputs = 16;
// Rows of x that one pass over a panel serves.
constexpr int64_t kMaxRows = 8;

// What a stored value is. kInt4 is two's complement, kE4m3 a float of 4 bits of exponent, 3 of
// mantissa, whose greatest code is not a number.
enum class Format { kInt8, kInt4, kE4m3 };

constexpr int BitsOf(Format format) { return format == Format::kInt4 ? 4 : 8; }

// A packed matrix [inputs, outputs].
struct QuantizedMatrix {
  const uint8_t* values;  // panels, one after the other
  const void* scales;     // [outputs / 16, inputs / block, 16], float32 or bfloat16
  const void* offsets;    // added to the values times scales, laid out as these; null: none
  bool are_scales_bfloat16;
  int64_t inputs, outputs;
  int64_t block;  // inputs that share a scale; a multiple of 8
  Format format;

  const uint8_t* Panel(int64_t panel) const {
    return values + panel * kPanelOutputs * inputs * BitsOf(format) / 8;
  }
};

// Digits of 8 bits, base 256, that stand for a float to within 2^-23 of its block's largest, as
// closely as a sum of floats is rounded; one digit stands for it to within 2^-7.
constexpr int kExactDigits = 3;

// Rows of x as whole numbers of one digit or kExactDigits, times a scale for each block.
struct RoundedRows {
  const int8_t* values;   // [rows, digits, inputs], the least digit first
  const float* scales;    // [rows, inputs / block]
  // Of each block's digits: what the products' sums start with, [rows, digits, inputs / block].
  const int32_t* starts;
  int digits;
};

// Rows of x as whole numbers of 16 bits times a scale for each block, which stand for them to within
// 2^-16 of the block's largest.
struct WordRows {
  const int16_t* values;  // [rows, inputs], of four inputs the even ones before the odd ones
  const float* scales;    // [rows, inputs / block]
};

// Blocks of panels whose weights in 8 bits have become 16, for many rows to meet.
struct WideBlocks {
  const int16_t* words;  // [panels, blocks * the block's inputs / 2, 16 outputs, 2], as in WordRows
  int64_t panel, panels;  // the first, and how many
  int64_t block, blocks;
};

// Inputs of a block whose products with bytes 32 bits can add up: 512 * 32767 * 128 < 2^31.
constexpr int64_t kMostWordInputs = 512;

// Inputs of a block at most that QuantizePanel takes.
constexpr int64_t kMostBlockInputs = 128;

// How floats are rounded to few bits; see kernels/quantize/api.py: quantize.
struct Rounding {
  Format format;
  float least, largest;  // stored values
  // A block's scale is its largest magnitude, or affine its span, over one of these: the first, or
  // one whose squared error is `found_again` times as small, the least.
  const float* steps;
  int64_t num_steps;
  float found_again;
  bool is_affine;  // blocks have offsets
  int64_t block;  // inputs that share a scale
  bool are_scales_bfloat16;
};

// What one instruction set brings; see quantized_kernels.inl.
struct QuantizedKernels {
  // Up to how many rows kExactDigits are faster than floats; 0: never.
  int64_t digit_rows;
  // Rows that panel_rounded takes at a time in kExactDigits.
  int64_t digit_chunk;
  // Rows that panel_words takes at a time, and rows and panels of tile_words.
  int64_t word_chunk, word_tile_rows, wide_panels;
  // y[16] = x[inputs] * one panel, with exact float32 x; sums have another order than below.
  void (*panel_of_one)(const QuantizedMatrix& w, int64_t panel, const float* x, float* y);
  // y[rows, 16] = x[rows, inputs] * one panel, likewise, in one order for any rows <= kMaxRows.
  void (*panel)(const QuantizedMatrix& w, int64_t panel, const float* x, int64_t rows, float* y,
                int64_t y_stride);
  // The same with x rounded and whole weights: products within a block are exact in integers.
  void (*panel_rounded)(const QuantizedMatrix& w, int64_t panel, const RoundedRows& x, int64_t rows,
                        float* y, int64_t y_stride);
  // The same with x in 16 bits and weights in 8.
  void (*panel_words)(const QuantizedMatrix& w, int64_t panel, const WordRows& x, int64_t rows,
                      float* y, int64_t y_stride);
  // Inputs [begin, begin + depth) of a panel as WideBlocks has them.
  void (*widen)(const QuantizedMatrix& w, int64_t panel, int64_t begin, int64_t depth, int16_t* to);
  // y[rows, 16 * panels] = x * these panels, to the same bits as panel_words; from the second block
  // on, y += x * these blocks. wide.panels is 1 or wide_panels.
  void (*tile_words)(const QuantizedMatrix& w, const WideBlocks& wide, const WordRows& x,
                     int64_t rows, float* y, int64_t y_stride);
  // One row of x rounded for products with w: see RoundedRows. Where x is not finite, its block's
  // scale is NaN.
  void (*round)(const float* x, const QuantizedMatrix& w, int digits, int8_t* values, float* scales,
                int32_t* starts);
  // The same as WordRows has it.
  void (*round_words)(const float* x, const QuantizedMatrix& w, int16_t* values, float* scales);
  // The sums of each of x's blocks, [w.inputs / w.block].
  void (*sum_blocks)(const float* x, const QuantizedMatrix& w, float* sums);
  // y[rows, 16] += sums[rows, blocks] * a panel's offsets: what the ways above leave out.
  void (*add_offsets)(const QuantizedMatrix& w, int64_t panel, const float* sums, int64_t rows,
                      float* y, int64_t y_stride);
  // Inputs [begin, begin + depth) of a panel as floats, without offsets, [depth, stride] of which 16
  // are written. begin and depth are multiples of 8.
  void (*dequantize)(const QuantizedMatrix& w, int64_t panel, int64_t begin, int64_t depth,
                     float* to, int64_t stride);
  // gate becomes silu(gate) * up; count is a multiple of 16.
  void (*gate)(float* gate, const float* up, int64_t count);
  // Rounds a panel of floats, whose input k and output i are from[k * input_stride + i *
  // output_stride], into its values, scales and, affine, offsets.
  void (*quantize_panel)(const Rounding& rounding, const float* from, int64_t input_stride,
                         int64_t output_stride, int64_t inputs, uint8_t* values, void* scales,
                         void* offsets);
};

}  // namespace moesaic

#endif  // MOESAIC_QUANTIZED_H_
