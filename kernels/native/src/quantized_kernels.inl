// Panels of quantised weights for one instruction set; included by isa_*.cc after
// gemm_kernels.inl, whose vectors it uses.

namespace moesaic {
namespace MOESAIC_ISA {

typedef uint16_t ShortVector __attribute__((vector_size(MOESAIC_VECTOR_BYTES / 2)));
typedef int32_t IntVector __attribute__((vector_size(MOESAIC_VECTOR_BYTES)));

// Vectors that hold a panel's 16 outputs.
constexpr int64_t kParts = kPanelOutputs / kLanes;
// Bytes of one input group of a panel: 16 outputs of 4 bytes.
constexpr int64_t kGroupBytes = 4 * kPanelOutputs;

MOESAIC_INLINE IntVector LoadInts(const void* from) {
  IntVector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

MOESAIC_INLINE Vector ToFloat(IntVector vector) { return __builtin_convertvector(vector, Vector); }

// The scales of a part of a panel's outputs, for inputs of one block.
MOESAIC_INLINE Vector Scales(const QuantizedMatrix& w, int64_t panel, int64_t block, int64_t part) {
  const int64_t index = (panel * (w.inputs / w.block) + block) * kPanelOutputs + part * kLanes;
  if (!w.are_scales_bfloat16) return Load(static_cast<const float*>(w.scales) + index);
  ShortVector upper;
  __builtin_memcpy(&upper, static_cast<const uint16_t*>(w.scales) + index, sizeof(upper));
  const IntVector bits = __builtin_convertvector(upper, IntVector) << 16;
  return (Vector)bits;
}

// Floats of e4m3 codes below 256. Numbers below 2^-6 have no leading one, and the code of what is
// not a number is no greater number here.
MOESAIC_INLINE Vector FromE4m3(IntVector code) {
  const IntVector magnitude = code & 0x7F;
  const IntVector small = (IntVector)(ToFloat(magnitude) * 0x1p-9f);
  IntVector bits = (magnitude << 20) + (120 << 23);  // the exponents' biases are 7 and 127
  bits = magnitude < 8 ? small : bits;
  bits = magnitude == 0x7F ? IntVector{} + 0x7FC00000 : bits;
  return (Vector)(bits | ((code & 0x80) << 24));
}

// Of each lane's four bytes, the weight of input `index` of the group: byte `index` for 8 bits,
// nibble `index` in the panel's order for 4.
template <Format kFormat>
MOESAIC_INLINE Vector Weight(IntVector group, int index) {
  if (kFormat == Format::kE4m3) return FromE4m3((group >> (8 * index)) & 0xFF);
  constexpr int kBits = BitsOf(kFormat);
  const int top = kBits == 8 ? 24 - 8 * index : index < 4 ? 28 - 8 * index : 24 - 8 * (index - 4);
  return ToFloat((group << top) >> (32 - kBits));
}

template <Format kFormat, int kRows>
static void ExactPanel(const QuantizedMatrix& w, int64_t panel, const float* x, float* y,
                       int64_t y_stride) {
  constexpr int kInputs = 32 / BitsOf(kFormat);  // of one group
  // A lone row's sum is cut in four, for a sum waits for the one before it.
  constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  const uint8_t* bytes = w.Panel(panel);
  Vector total[kRows][kParts] = {};
  for (int64_t block = 0; block < w.inputs / w.block; ++block) {
    Vector sums[kRows][kParts][kChains] = {};
    for (int64_t k = block * w.block; k < (block + 1) * w.block; k += kInputs, bytes += kGroupBytes) {
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part) {
        const IntVector group = LoadInts(bytes + part * sizeof(IntVector));
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
// kOffset times x's sum to their products.
#if MOESAIC_VECTOR_BYTES == 64
constexpr int64_t kDigitRows = 4;
constexpr int32_t kOffset = 128;  // of the instruction's operands one is unsigned: it gets w + 128

MOESAIC_INLINE IntVector DotUnsigned(IntVector sums, int32_t x, IntVector weights) {
  return (IntVector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(x));
}

MOESAIC_INLINE IntVector DotSigned(IntVector sums, int32_t x, IntVector weights) {
  return DotUnsigned(sums, x, weights ^ static_cast<int32_t>(0x80808080));
}
#elif MOESAIC_VECTOR_BYTES == 32
constexpr int64_t kDigitRows = 0;  // three digits take more instructions than a float
constexpr int32_t kOffset = 0;

MOESAIC_INLINE IntVector DotUnsigned(IntVector sums, int32_t x, IntVector weights) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(x));
  return sums + (IntVector)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// |w| * (x with w's sign): at most 127 * 127 * 2 in a pair, which 16 bits hold. (x is never -128.)
MOESAIC_INLINE IntVector DotSigned(IntVector sums, int32_t x, IntVector weights) {
  const __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x), (__m256i)weights);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)weights), signed_x);
  return sums + (IntVector)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr int64_t kDigitRows = 0;  // three digits take more instructions than a float
constexpr int32_t kOffset = 0;

MOESAIC_INLINE IntVector DotSigned(IntVector sums, int32_t x, IntVector weights) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sums += ((weights << (24 - 8 * i)) >> 24) * ((x << (24 - 8 * i)) >> 24);
  return sums;
}

MOESAIC_INLINE IntVector DotUnsigned(IntVector sums, int32_t x, IntVector weights) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sums += ((weights >> (8 * i)) & 0xFF) * ((x << (24 - 8 * i)) >> 24);
  return sums;
}
#endif

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
      const int32_t offset = (kBits == 8 ? kOffset : 8) * x.sums[i * blocks + block];
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part) sums[i][part] = IntVector{} - offset;
    }
    for (int64_t k = block * w.block; k < (block + 1) * w.block; k += kInputs) {
#pragma GCC unroll 4
      for (int64_t part = 0; part < kParts; ++part, bytes += sizeof(IntVector)) {
        const IntVector group = LoadInts(bytes);
        if (kBits == 8) {
#pragma GCC unroll 24
          for (int i = 0; i < kSums; ++i) {
            const int8_t* inputs = x.values + i * w.inputs + k;
            sums[i][part] = DotSigned(sums[i][part], FourBytes(inputs), group);
          }
        } else {
          // Two's complement nibbles plus 8 are unsigned ones; 8 times x's sum is taken off above.
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
    case Format::kInt8: return ExactPanel<Format::kInt8, kRows>(w, panel, x, y, y_stride);
    case Format::kInt4: return ExactPanel<Format::kInt4, kRows>(w, panel, x, y, y_stride);
    case Format::kE4m3: return ExactPanel<Format::kE4m3, kRows>(w, panel, x, y, y_stride);
  }
}

template <int kRows>
static void RoundedPanelOfRows(const QuantizedMatrix& w, int64_t panel, const RoundedRows& x,
                               float* y, int64_t y_stride) {
  if constexpr (kRows <= kDigitRows) {
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

// The block of x from `x` on as whole numbers of `kDigits` digits; returns its scale.
template <int kDigits>
static float RoundBlock(const float* x, int64_t inputs, int64_t block, int64_t blocks,
                        int8_t* values, int32_t* sums) {
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
  for (int digit = 0; digit < kDigits; ++digit) sums[digit * blocks] = sum[digit];
  return is_finite ? largest / kLargest : __builtin_nanf("");
}

static void Round(const float* x, int64_t inputs, int64_t block, int digits, int8_t* values,
                  float* scales, int32_t* sums) {
  const int64_t blocks = inputs / block;
  for (int64_t i = 0; i < blocks; ++i, x += block, values += block) {
    scales[i] = digits == 1
                    ? RoundBlock<1>(x, inputs, block, blocks, values, sums + i)
                    : RoundBlock<kExactDigits>(x, inputs, block, blocks, values, sums + i);
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

extern const QuantizedKernels kQuantizedKernels;
const QuantizedKernels kQuantizedKernels = {kDigitRows, ExactRows, RoundedRowsPanel, Round, Dequantize};

}  // namespace MOESAIC_ISA
}  // namespace moesaic
