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
//
// DotWords does so for two words in each lane.
#if MOESAIC_VECTOR_BYTES == 64
constexpr int64_t kDigitRows = 4, kDigitChunk = 4;
constexpr int64_t kWordChunk = 8, kWordTileRows = 7, kWidePanels = 2;
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

MOESAIC_INLINE IntVector DotWords(IntVector sums, int32_t x, IntVector weights) {
  return (IntVector)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(x));
}

MOESAIC_INLINE IntVector LowBytes(IntVector words) {
  return (IntVector)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)words, 8), 8);
}

MOESAIC_INLINE IntVector HighBytes(IntVector words) {
  return (IntVector)_mm512_srai_epi16((__m512i)words, 8);
}
#elif MOESAIC_VECTOR_BYTES == 32
constexpr int64_t kDigitRows = 0;  // three digits take more instructions than a float
constexpr int64_t kDigitChunk = 1;
constexpr int64_t kWordChunk = 4, kWordTileRows = 4, kWidePanels = 1;
constexpr int32_t kOffset = 0;

MOESAIC_INLINE IntVector DotUnsigned(IntVector sums, int32_t x, IntVector weights) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(x));
  return sums + (IntVector)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

MOESAIC_INLINE IntVector DotWords(IntVector sums, int32_t x, IntVector weights) {
  return sums + (IntVector)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(x));
}

MOESAIC_INLINE IntVector LowBytes(IntVector words) {
  return (IntVector)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)words, 8), 8);
}

MOESAIC_INLINE IntVector HighBytes(IntVector words) {
  return (IntVector)_mm256_srai_epi16((__m256i)words, 8);
}

// Of any x: bytes become words, first those of even places.
MOESAIC_INLINE IntVector DotDigits(IntVector sums, int32_t x, IntVector weights) {
  const __m256i xs = _mm256_set1_epi32(x);
  const __m256i even = _mm256_madd_epi16((__m256i)LowBytes(weights),
                                         _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8));
  const __m256i odd = _mm256_madd_epi16((__m256i)HighBytes(weights), _mm256_srai_epi16(xs, 8));
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
constexpr int64_t kWordChunk = 2, kWordTileRows = 2, kWidePanels = 1;
constexpr int32_t kOffset = 0;

#if defined(__SSE2__)
MOESAIC_INLINE IntVector DotWords(IntVector sums, int32_t x, IntVector weights) {
  return sums + (IntVector)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32(x));
}
#else
MOESAIC_INLINE IntVector DotWords(IntVector sums, int32_t x, IntVector weights) {
  return sums + ((weights << 16) >> 16) * static_cast<int16_t>(x) + (weights >> 16) * (x >> 16);
}
#endif

typedef int16_t Words __attribute__((vector_size(MOESAIC_VECTOR_BYTES)));

MOESAIC_INLINE IntVector LowBytes(IntVector words) { return (IntVector)(((Words)words << 8) >> 8); }

MOESAIC_INLINE IntVector HighBytes(IntVector words) { return (IntVector)((Words)words >> 8); }

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

MOESAIC_INLINE int32_t FourBytes(const void* from) {
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

// What a block's sums add to an output.
MOESAIC_INLINE Vector WithBlock(Vector total, Vector scale, float x_scale, IntVector sum) {
  return total + scale * x_scale * ToFloat(sum);
}

// Of few rows each sum is cut in two, for a sum waits for the one before it: whole numbers add up to
// the same in any order.
template <int kRows>
static void WordsPanel(const QuantizedMatrix& w, int64_t panel, const WordRows& x, float* y,
                       int64_t y_stride) {
  const int64_t blocks = w.inputs / w.block;
  const uint8_t* bytes = w.Panel(panel);
  Vector total[kRows][kParts] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    IntVector evens[kRows][kParts] = {}, odds[kRows][kParts] = {};
    for (int64_t k = block * w.block; k < (block + 1) * w.block; k += 4) {
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part, bytes += sizeof(IntVector)) {
        const IntVector group = LoadInts(bytes);
        const IntVector even = LowBytes(group), odd = HighBytes(group);
        if (part % kPartsOfLine == 0) __builtin_prefetch(bytes + kAhead);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          const int16_t* inputs = x.values + row * w.inputs + k;
          evens[row][part] = DotWords(evens[row][part], FourBytes(inputs), even);
          odds[row][part] = DotWords(odds[row][part], FourBytes(inputs + 2), odd);
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      const Vector scale = Scales(w, panel, block, part);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        total[row][part] = WithBlock(total[row][part], scale, x.scales[row * blocks + block],
                                     evens[row][part] + odds[row][part]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      Store(y + row * y_stride + part * kLanes, total[row][part]);
    }
  }
}

// See QuantizedKernels::widen.
static void Widen(const QuantizedMatrix& w, int64_t panel, int64_t begin, int64_t depth,
                  int16_t* to) {
  const uint8_t* bytes = w.Panel(panel) + begin / 4 * kGroupBytes;
  for (int64_t i = 0; i < depth / 4; ++i, bytes += kGroupBytes, to += kGroupBytes) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      const IntVector group = LoadInts(bytes + part * sizeof(IntVector));
      const IntVector even = LowBytes(group), odd = HighBytes(group);
      __builtin_memcpy(to + part * 2 * kLanes, &even, sizeof(even));
      __builtin_memcpy(to + (kParts + part) * 2 * kLanes, &odd, sizeof(odd));
    }
  }
}

// See QuantizedKernels::tile_words.
template <int kRows, int kPanels>
static void WordsTile(const QuantizedMatrix& w, const WideBlocks& wide, const WordRows& x, float* y,
                      int64_t y_stride) {
  constexpr int kVectors = kPanels * kParts;
  const int64_t blocks = w.inputs / w.block;
  Vector total[kRows][kVectors] = {};
  if (wide.block > 0) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) total[row][i] = Load(y + row * y_stride + i * kLanes);
    }
  }
  const int16_t* words = wide.words;
  const int64_t panel_words = wide.blocks * w.block * kPanelOutputs;
  for (int64_t block = wide.block; block < wide.block + wide.blocks; ++block) {
    IntVector sums[kRows][kVectors] = {};
    // Two inputs at a time, the even ones of four and the odd ones.
    for (int64_t k = block * w.block; k < (block + 1) * w.block; k += 2) {
      IntVector weights[kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        weights[i] = LoadInts(words + i / kParts * panel_words + i % kParts * 2 * kLanes);
      }
      words += 2 * kPanelOutputs;
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const int32_t inputs = FourBytes(x.values + row * w.inputs + k);
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sums[row][i] = DotWords(sums[row][i], inputs, weights[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const Vector scale = Scales(w, wide.panel + i / kParts, block, i % kParts);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        total[row][i] =
            WithBlock(total[row][i], scale, x.scales[row * blocks + block], sums[row][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) Store(y + row * y_stride + i * kLanes, total[row][i]);
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

template <int kRows>
static void WordsPanelUpTo(const QuantizedMatrix& w, int64_t panel, const WordRows& x, int64_t rows,
                           float* y, int64_t y_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return WordsPanelUpTo<kRows - 1>(w, panel, x, rows, y, y_stride);
  }
  WordsPanel<kRows>(w, panel, x, y, y_stride);
}

template <int kRows>
static void WordsTileUpTo(const QuantizedMatrix& w, const WideBlocks& wide, const WordRows& x,
                          int64_t rows, float* y, int64_t y_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return WordsTileUpTo<kRows - 1>(w, wide, x, rows, y, y_stride);
  }
  if (wide.panels == 1) {
    WordsTile<kRows, 1>(w, wide, x, y, y_stride);
  } else {
    WordsTile<kRows, kWidePanels>(w, wide, x, y, y_stride);
  }
}

// How a block of x becomes whole numbers up to `kLargest`.
struct BlockRounding {
  float inverse;  // what x is multiplied by; 0: all of it is 0
  float scale;
};

MOESAIC_INLINE BlockRounding RoundingOf(const float* x, int64_t block, float largest_number) {
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
  return {is_finite && largest > 1e-30f ? largest_number / largest : 0.0f,
          is_finite ? largest / largest_number : __builtin_nanf("")};
}

// To the nearest whole number.
MOESAIC_INLINE int32_t Nearest(float x) {
  return static_cast<int32_t>(x + __builtin_copysignf(0.5f, x));
}

// The block of x from `x` on as whole numbers of `kDigits` digits; returns its scale. Of kBlock
// inputs, or of so many as `any_block` says.
template <int kDigits, int kBlock>
static float RoundBlock(const float* x, int64_t inputs, int64_t any_block, int64_t blocks,
                        int32_t offset, int8_t* values, int32_t* starts) {
  const int64_t block = kBlock > 0 ? kBlock : any_block;
  // The greatest digit 127; the lower ones have room for what rounding adds.
  constexpr float kLargest = kDigits == 1 ? 127.0f : 127.0f * 65536.0f;
  const BlockRounding rounding = RoundingOf(x, block, kLargest);
  int32_t sum[kDigits] = {};
  if (rounding.inverse == 0.0f) {
    for (int digit = 0; digit < kDigits; ++digit) {
      for (int64_t k = 0; k < block; ++k) values[digit * inputs + k] = 0;
    }
  } else {
    for (int64_t k = 0; k < block; ++k) {
      int32_t rest = Nearest(x[k] * rounding.inverse);
      for (int digit = 0; digit < kDigits; ++digit) {
        const int8_t low = static_cast<int8_t>(rest);  // signed: the rest is rounded to nearest
        values[digit * inputs + k] = low;
        sum[digit] += low;
        rest = (rest - low) >> 8;
      }
    }
  }
  for (int digit = 0; digit < kDigits; ++digit) starts[digit * blocks] = -offset * sum[digit];
  return rounding.scale;
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

template <int kBlock>
static void RoundBlocksToWords(const float* x, const QuantizedMatrix& w, int16_t* values,
                               float* scales) {
  const int64_t block = kBlock > 0 ? kBlock : w.block;
  for (int64_t i = 0; i < w.inputs / block; ++i, x += block, values += block) {
    const BlockRounding rounding = RoundingOf(x, block, 32767.0f);
    scales[i] = rounding.scale;
    if (rounding.inverse == 0.0f) {
      for (int64_t k = 0; k < block; ++k) values[k] = 0;
      continue;
    }
    for (int64_t k = 0; k < block; k += 4) {
      values[k] = Nearest(x[k] * rounding.inverse);
      values[k + 1] = Nearest(x[k + 2] * rounding.inverse);
      values[k + 2] = Nearest(x[k + 1] * rounding.inverse);
      values[k + 3] = Nearest(x[k + 3] * rounding.inverse);
    }
  }
}

static void RoundWords(const float* x, const QuantizedMatrix& w, int16_t* values, float* scales) {
  if (w.block == 32) {
    RoundBlocksToWords<32>(x, w, values, scales);
  } else {
    RoundBlocksToWords<0>(x, w, values, scales);
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

// See QuantizedKernels::sum_blocks.
static void SumBlocks(const float* x, const QuantizedMatrix& w, float* sums) {
  for (int64_t block = 0; block < w.inputs / w.block; ++block, x += w.block) {
    float parts[8] = {};  // blocks are multiples of 8
    for (int64_t k = 0; k < w.block; k += 8) {
      for (int i = 0; i < 8; ++i) parts[i] += x[k + i];
    }
    sums[block] = ((parts[0] + parts[4]) + (parts[1] + parts[5])) +
                  ((parts[2] + parts[6]) + (parts[3] + parts[7]));
  }
}

template <int kRows>
static void AddOffsetsToRows(const QuantizedMatrix& w, int64_t panel, const float* sums, float* y,
                             int64_t y_stride) {
  const int64_t blocks = w.inputs / w.block;
  Vector total[kRows][kParts] = {};
  for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      const Vector offset = OfBlock(w, w.offsets, panel, block, part);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        total[row][part] += Broadcast(sums[row * blocks + block]) * offset;
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int64_t part = 0; part < kParts; ++part) {
      float* to = y + row * y_stride + part * kLanes;
      Store(to, Load(to) + total[row][part]);
    }
  }
}

// See QuantizedKernels::add_offsets.
static void AddOffsets(const QuantizedMatrix& w, int64_t panel, const float* sums, int64_t rows,
                       float* y, int64_t y_stride) {
  const int64_t blocks = w.inputs / w.block;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    AddOffsetsToRows<4>(w, panel, sums + row * blocks, y + row * y_stride, y_stride);
  }
  for (; row < rows; ++row) {
    AddOffsetsToRows<1>(w, panel, sums + row * blocks, y + row * y_stride, y_stride);
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
    kDigitRows,
    kDigitChunk,
    kWordChunk,
    kWordTileRows,
    kWidePanels,
    PanelOfOne,
    ExactRows,
    RoundedRowsPanel,
    WordsPanelUpTo<kWordChunk>,
    Widen,
    WordsTileUpTo<kWordTileRows>,
    Round,
    RoundWords,
    SumBlocks,
    AddOffsets,
    Dequantize,
    Gate,
    QuantizePanel};

}  // namespace MOESAIC_ISA
}  // namespace moesaic
