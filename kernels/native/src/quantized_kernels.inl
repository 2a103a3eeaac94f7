// Panels of quantised weights for one instruction set; included by isa_*.cc after
// gemm_kernels.inl, whose vectors it uses.

namespace moesaic {
namespace MOESAIC_ISA {

#include "vector_exp.inl"
#include "quantized_vectors.inl"
#include "quantize_panel.inl"

// Each row's sum is cut in kChains, for a sum waits for the one before it.
template <Format kFormat, int kRows, int kChains>
static void ExactPanel(const QuantizedMatrix& w, int64_t panel, const float* x, float* y,
                       int64_t y_stride) {
  constexpr int kInputs = 32 / BitsOf(kFormat);  // of one group
  const uint8_t* bytes = w.Panel(panel);
  Vector total[kRows][kParts] = {};
  for (int64_t block = 0; block < w.inputs / w.block; ++block) {
    Vector sums[kRows][kParts][kChains] = {};
    for (int64_t k = block * w.block; k < (block + 1) * w.block; k += kInputs, bytes += kGroupBytes) {
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part) {
        const IntVector group = LoadInts(bytes + part * sizeof(IntVector));
        if (part % kPartsOfLine == 0) __builtin_prefetch(bytes + part * sizeof(IntVector) + kAhead);
#pragma GCC unroll 8
        for (int i = 0; i < kInputs; ++i) {
          const Vector weight = Weight<kFormat>(group, i);
#pragma GCC unroll 8
          for (int row = 0; row < kRows; ++row) {
            sums[row][part][i % kChains] += Broadcast(x[row * w.inputs + k + i]) * weight;
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      const Vector scale = Scales(w, panel, block, part);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        Vector sum = sums[row][part][0];
        for (int chain = 1; chain < kChains; ++chain) sum += sums[row][part][chain];
        total[row][part] += scale * sum;
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int64_t part = 0; part < kParts; ++part) {
      Store(y + row * y_stride + part * kLanes, total[row][part]);
    }
  }
}

// sums + the products of four bytes in each lane: x's (signed, the same in all lanes) with
// weights'. DotUnsigned takes unsigned weights of up to 15, DotSigned signed ones, and adds
// kOffset times x's sum to their products; x's sums start so much lower.
#if MOESAIC_VECTOR_BYTES == 64
constexpr int64_t kDigitRows = 4, kDigitChunk = 4;
constexpr int32_t kOffset = 128;  // of the instruction's operands one is unsigned: it gets w + 128

MOESAIC_INLINE IntVector DotUnsigned(IntVector sums, int32_t x, IntVector weights) {
  return (IntVector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(x));
}

MOESAIC_INLINE IntVector DotSigned(IntVector sums, int32_t x, IntVector weights) {
  return DotUnsigned(sums, x, weights ^ static_cast<int32_t>(0x80808080));
}

MOESAIC_INLINE IntVector DotDigits(IntVector sums, int32_t x, IntVector weights) {
  return DotSigned(sums, x, weights);
}
#elif MOESAIC_VECTOR_BYTES == 32
constexpr int64_t kDigitRows = 0;  // three digits take more instructions than a float
constexpr int64_t kDigitChunk = 1;
constexpr int32_t kOffset = 0;

MOESAIC_INLINE IntVector DotUnsigned(IntVector sums, int32_t x, IntVector weights) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(x));
  return sums + (IntVector)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Of any x: bytes become 16 bits, first those of even places.
MOESAIC_INLINE IntVector DotDigits(IntVector sums, int32_t x, IntVector weights) {
  const __m256i xs = _mm256_set1_epi32(x), ws = (__m256i)weights;
  const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(ws, 8), 8),
                                         _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(ws, 8), _mm256_srai_epi16(xs, 8));
  return sums + (IntVector)_mm256_add_epi32(even, odd);
}

// |w| * (x with w's sign): at most 127 * 127 * 2 in a pair, which 16 bits hold. x is never -128, as
// the lower of several digits may be.
MOESAIC_INLINE IntVector DotSigned(IntVector sums, int32_t x, IntVector weights) {
  const __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x), (__m256i)weights);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)weights), signed_x);
  return sums + (IntVector)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr int64_t kDigitRows = 0;  // three digits take more instructions than a float
constexpr int64_t kDigitChunk = 1;
constexpr int32_t kOffset = 0;

MOESAIC_INLINE IntVector DotSigned(IntVector sums, int32_t x, IntVector weights) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sums += ((weights << (24 - 8 * i)) >> 24) * ((x << (24 - 8 * i)) >> 24);
  return sums;
}

MOESAIC_INLINE IntVector DotDigits(IntVector sums, int32_t x, IntVector weights) {
  return DotSigned(sums, x, weights);
}

MOESAIC_INLINE IntVector DotUnsigned(IntVector sums, int32_t x, IntVector weights) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sums += ((weights >> (8 * i)) & 0xFF) * ((x << (24 - 8 * i)) >> 24);
  return sums;
}
#endif

MOESAIC_INLINE IntVector AllInts(int32_t value) { return value - IntVector{}; }

MOESAIC_INLINE int32_t FourBytes(const int8_t* from) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return bytes;
}

template <int kBits, int kRows, int kDigits>
static void RoundedPanel(const QuantizedMatrix& w, int64_t panel, const RoundedRows& x, float* y,
                         int64_t y_stride) {
  constexpr int kInputs = 32 / kBits;  // of one group
  constexpr int kSums = kRows * kDigits;
  const int64_t blocks = w.inputs / w.block;
  const uint8_t* bytes = w.Panel(panel);
  Vector total[kRows][kParts] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    IntVector sums[kSums][kParts];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part) sums[i][part] = AllInts(x.starts[i * blocks + block]);
    }
    for (int64_t k = block * w.block; k < (block + 1) * w.block; k += kInputs) {
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part, bytes += sizeof(IntVector)) {
        const IntVector group = LoadInts(bytes);
        if (part % kPartsOfLine == 0) __builtin_prefetch(bytes + kAhead);
        if (kBits == 8) {
#pragma GCC unroll 24
          for (int i = 0; i < kSums; ++i) {
            const int8_t* inputs = x.values + i * w.inputs + k;
            sums[i][part] = kDigits == 1 ? DotSigned(sums[i][part], FourBytes(inputs), group)
                                         : DotDigits(sums[i][part], FourBytes(inputs), group);
          }
        } else {
          // Two's complement nibbles plus 8 are unsigned ones.
          const IntVector unsigned_group = group ^ static_cast<int32_t>(0x88888888);
          const IntVector low = unsigned_group & 0x0F0F0F0F;
          const IntVector high = (unsigned_group >> 4) & 0x0F0F0F0F;
#pragma GCC unroll 24
          for (int i = 0; i < kSums; ++i) {
            const int8_t* inputs = x.values + i * w.inputs + k;
            sums[i][part] = DotUnsigned(sums[i][part], FourBytes(inputs), low);
            sums[i][part] = DotUnsigned(sums[i][part], FourBytes(inputs + 4), high);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      const Vector scale = Scales(w, panel, block, part);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        Vector sum = ToFloat(sums[row * kDigits + kDigits - 1][part]);
#pragma GCC unroll 3
        for (int digit = kDigits - 2; digit >= 0; --digit) {
          sum = 256.0f * sum + ToFloat(sums[row * kDigits + digit][part]);
        }
        total[row][part] += scale * x.scales[row * blocks + block] * sum;
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int64_t part = 0; part < kParts; ++part) {
      Store(y + row * y_stride + part * kLanes, total[row][part]);
    }
  }
}

template <int kRows>
static void PanelOfRows(const QuantizedMatrix& w, int64_t panel, const float* x, float* y,
                        int64_t y_stride) {
  switch (w.format) {
    case Format::kInt8: return ExactPanel<Format::kInt8, kRows, 1>(w, panel, x, y, y_stride);
    case Format::kInt4: return ExactPanel<Format::kInt4, kRows, 1>(w, panel, x, y, y_stride);
    case Format::kE4m3: return ExactPanel<Format::kE4m3, kRows, 1>(w, panel, x, y, y_stride);
  }
}

template <int kRows>
static void RoundedPanelOfRows(const QuantizedMatrix& w, int64_t panel, const RoundedRows& x,
                               float* y, int64_t y_stride) {
  if constexpr (kRows <= kDigitChunk) {
    if (x.digits == kExactDigits) {
      if (w.format == Format::kInt8) {
        RoundedPanel<8, kRows, kExactDigits>(w, panel, x, y, y_stride);
      } else {
        RoundedPanel<4, kRows, kExactDigits>(w, panel, x, y, y_stride);
      }
      return;
    }
  }
  if (w.format == Format::kInt8) {
    RoundedPanel<8, kRows, 1>(w, panel, x, y, y_stride);
  } else {
    RoundedPanel<4, kRows, 1>(w, panel, x, y, y_stride);
  }
}

// Making floats of e4m3 takes longer than a sum waits.
static void PanelOfOne(const QuantizedMatrix& w, int64_t panel, const float* x, float* y) {
  switch (w.format) {
    case Format::kInt8: return ExactPanel<Format::kInt8, 1, 4>(w, panel, x, y, 0);
    case Format::kInt4: return ExactPanel<Format::kInt4, 1, 4>(w, panel, x, y, 0);
    case Format::kE4m3: return ExactPanel<Format::kE4m3, 1, 1>(w, panel, x, y, 0);
  }
}

static void ExactRows(const QuantizedMatrix& w, int64_t panel, const float* x, int64_t rows,
                      float* y, int64_t y_stride) {
  static constexpr decltype(&PanelOfRows<1>) kByRows[] = {
      PanelOfRows<1>, PanelOfRows<2>, PanelOfRows<3>, PanelOfRows<4>,
      PanelOfRows<5>, PanelOfRows<6>, PanelOfRows<7>, PanelOfRows<8>};
  kByRows[rows - 1](w, panel, x, y, y_stride);
}

static void RoundedRowsPanel(const QuantizedMatrix& w, int64_t panel, const RoundedRows& x,
                             int64_t rows, float* y, int64_t y_stride) {
  static constexpr decltype(&RoundedPanelOfRows<1>) kByRows[] = {
      RoundedPanelOfRows<1>, RoundedPanelOfRows<2>, RoundedPanelOfRows<3>, RoundedPanelOfRows<4>,
      RoundedPanelOfRows<5>, RoundedPanelOfRows<6>, RoundedPanelOfRows<7>, RoundedPanelOfRows<8>};
  kByRows[rows - 1](w, panel, x, y, y_stride);
}

// The block of x from `x` on as whole numbers of `kDigits` digits; returns its scale. Of kBlock
// inputs, or of so many as `any_block` says.
template <int kDigits, int kBlock>
static float RoundBlock(const float* x, int64_t inputs, int64_t any_block, int64_t blocks,
                        int32_t offset, int8_t* values, int32_t* starts) {
  const int64_t block = kBlock > 0 ? kBlock : any_block;
  // The greatest digit 127; the lower ones have room for what rounding adds.
  constexpr float kLargest = kDigits == 1 ? 127.0f : 127.0f * 65536.0f;
  // Magnitudes are in the order of their bits, and what is not finite is past all others: so no
  // comparison of floats keeps the compiler from its vectors.
  uint32_t largest_bits = 0;
  for (int64_t k = 0; k < block; ++k) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + k, sizeof(bits));
    bits &= 0x7FFFFFFF;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  __builtin_memcpy(&largest, &largest_bits, sizeof(largest));
  const bool is_finite = largest_bits < 0x7F800000;
  // Where 1 / largest would be infinite, every x is 0 for this purpose, too.
  const float inverse = is_finite && largest > 1e-30f ? kLargest / largest : 0.0f;
  int32_t sum[kDigits] = {};
  if (inverse == 0.0f) {
    for (int digit = 0; digit < kDigits; ++digit) {
      for (int64_t k = 0; k < block; ++k) values[digit * inputs + k] = 0;
    }
  } else {
    for (int64_t k = 0; k < block; ++k) {
      const float scaled = x[k] * inverse;
      int32_t rest = static_cast<int32_t>(scaled + __builtin_copysignf(0.5f, scaled));
      for (int digit = 0; digit < kDigits; ++digit) {
        const int8_t low = static_cast<int8_t>(rest);  // signed: the rest is rounded to nearest
        values[digit * inputs + k] = low;
        sum[digit] += low;
        rest = (rest - low) >> 8;
      }
    }
  }
  for (int digit = 0; digit < kDigits; ++digit) starts[digit * blocks] = -offset * sum[digit];
  return is_finite ? largest / kLargest : __builtin_nanf("");
}

template <int kDigits>
static void RoundBlocks(const float* x, const QuantizedMatrix& w, int8_t* values, float* scales,
                        int32_t* starts) {
  const int64_t inputs = w.inputs, block = w.block, blocks = inputs / block;
  const int32_t offset = w.format == Format::kInt8 ? kOffset : 8;
  const auto round_block = block == 32 ? RoundBlock<kDigits, 32> : RoundBlock<kDigits, 0>;
  for (int64_t i = 0; i < blocks; ++i, x += block, values += block) {
    scales[i] = round_block(x, inputs, block, blocks, offset, values, starts + i);
  }
}

static void Round(const float* x, const QuantizedMatrix& w, int digits, int8_t* values,
                  float* scales, int32_t* starts) {
  if (digits == 1) {
    RoundBlocks<1>(x, w, values, scales, starts);
  } else {
    RoundBlocks<kExactDigits>(x, w, values, scales, starts);
  }
}

template <Format kFormat>
static void DequantizePanel(const QuantizedMatrix& w, int64_t panel, int64_t begin, int64_t depth,
                            float* to, int64_t stride) {
  constexpr int kInputs = 32 / BitsOf(kFormat);  // of one group
  const uint8_t* bytes = w.Panel(panel) + begin / kInputs * kGroupBytes;
  for (int64_t k = begin; k < begin + depth; k += kInputs) {
    for (int64_t part = 0; part < kParts; ++part, bytes += sizeof(IntVector)) {
      const IntVector group = LoadInts(bytes);
      const Vector scale = Scales(w, panel, k / w.block, part);
#pragma GCC unroll 8
      for (int i = 0; i < kInputs; ++i) {
        Store(to + (k - begin + i) * stride + part * kLanes, scale * Weight<kFormat>(group, i));
      }
    }
  }
}

static void Dequantize(const QuantizedMatrix& w, int64_t panel, int64_t begin, int64_t depth,
                       float* to, int64_t stride) {
  switch (w.format) {
    case Format::kInt8: return DequantizePanel<Format::kInt8>(w, panel, begin, depth, to, stride);
    case Format::kInt4: return DequantizePanel<Format::kInt4>(w, panel, begin, depth, to, stride);
    case Format::kE4m3: return DequantizePanel<Format::kE4m3>(w, panel, begin, depth, to, stride);
  }
}

// See QuantizedKernels::gate. Beyond 88 a float32 has no exponential, and the gate is as good as 0.
static void Gate(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector x = Load(gate + i), minus = -x;
    const Vector clipped = minus > 88.0f ? Broadcast(88.0f) : minus;
    Store(gate + i, x / (1.0f + Exp(clipped)) * Load(up + i));
  }
}

extern const QuantizedKernels kQuantizedKernels;
const QuantizedKernels kQuantizedKernels = {
    kDigitRows,       kDigitChunk, PanelOfOne, ExactRows,    RoundedRowsPanel,
    Round,            Dequantize,  Gate,       QuantizePanel};

}  // namespace MOESAIC_ISA
}  // namespace moesaic
