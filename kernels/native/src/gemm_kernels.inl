// The inner parts of a matrix product for one instruction set.
//
// The including file defines MOESAIC_ISA (a name), MOESAIC_VECTOR_BYTES, MOESAIC_TILE_ROWS and
// MOESAIC_TILE_VECTORS, so that the tile's sums, a row of B and a broadcast of A fill the registers.

namespace moesaic {
namespace MOESAIC_ISA {

#include "vector.inl"

MOESAIC_INLINE float ToFloat(float value) { return value; }
MOESAIC_INLINE float ToFloat(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

constexpr int64_t kTileRows = MOESAIC_TILE_ROWS;
constexpr int64_t kTileVectors = MOESAIC_TILE_VECTORS;
constexpr int64_t kTileCols = kTileVectors * kLanes;
static_assert(kTileRows <= kMaxTileRows && kTileCols <= kMaxTileCols, "the edge tile is too small");
static_assert(kTileCols % 16 == 0, "quantised panels of 16 columns fill a tile");
static_assert(kBlockRows % kTileRows == 0, "packed blocks hold whole tiles");

static void Tile(int64_t depth, const float* a, const float* b, float* c, int64_t c_stride,
                 bool accumulate) {
  Vector sums[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTileVectors; ++j) sums[i][j] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileCols) {
    Vector row[kTileVectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTileVectors; ++j) row[j] = Load(b + j * kLanes);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileRows; ++i) {
      const Vector factor = Broadcast(a[i]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTileVectors; ++j) sums[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTileVectors; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      Store(to, accumulate ? Load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

// Four vectors of four, transposed in registers.
MOESAIC_INLINE void Transpose4(const float* s0, const float* s1, const float* s2, const float* s3,
                               float* packed, int64_t width) {
  const Vector4 r0 = Load4(s0), r1 = Load4(s1), r2 = Load4(s2), r3 = Load4(s3);
  const Vector4 low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
  const Vector4 high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
  const Vector4 low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
  const Vector4 high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  Store4(packed, __builtin_shufflevector(low01, low23, 0, 1, 4, 5));
  Store4(packed + width, __builtin_shufflevector(low01, low23, 2, 3, 6, 7));
  Store4(packed + 2 * width, __builtin_shufflevector(high01, high23, 0, 1, 4, 5));
  Store4(packed + 3 * width, __builtin_shufflevector(high01, high23, 2, 3, 6, 7));
}

// See GemmKernels::pack_rows.
template <int64_t kWidth>
static void Pack(const float* source, int64_t depth_stride, int64_t stride, int64_t depth,
                 int64_t width, float* packed) {
  if (stride == 1 && width == kWidth) {
    for (int64_t k = 0; k < depth; ++k) {
      __builtin_memcpy(packed + k * kWidth, source + k * depth_stride, kWidth * sizeof(float));
    }
    return;
  }
  if (depth_stride == 1 && width == kWidth && kWidth % 4 == 0) {
    const int64_t whole = depth / 4 * 4;
    for (int64_t k = 0; k < whole; k += 4) {
      for (int64_t i = 0; i < kWidth; i += 4) {
        const float* from = source + i * stride + k;
        Transpose4(from, from + stride, from + 2 * stride, from + 3 * stride,
                   packed + k * kWidth + i, kWidth);
      }
    }
    for (int64_t k = whole; k < depth; ++k) {
      for (int64_t i = 0; i < kWidth; ++i) packed[k * kWidth + i] = source[i * stride + k];
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t i = 0; i < kWidth; ++i) {
      packed[k * kWidth + i] = i < width ? source[k * depth_stride + i * stride] : 0.0f;
    }
  }
}

// See GemmKernels::pack_half_rows.
template <int64_t kWidth>
static void PackHalves(const uint16_t* source, int64_t depth_stride, int64_t stride, int64_t depth,
                       int64_t width, float* packed) {
  if (width == kWidth && stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < kWidth; ++i) {
        packed[k * kWidth + i] = ToFloat(source[k * depth_stride + i]);
      }
    }
    return;
  }
  if (width == kWidth && depth_stride == 1) {
    for (int64_t k = 0; k < depth; k += 4) {  // of a line of the cache four inputs are near
      const int64_t end = depth - k < 4 ? depth : k + 4;
      for (int64_t i = 0; i < kWidth; ++i) {
        for (int64_t at = k; at < end; ++at) {
          packed[at * kWidth + i] = ToFloat(source[i * stride + at]);
        }
      }
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t i = 0; i < kWidth; ++i) {
      packed[k * kWidth + i] = i < width ? ToFloat(source[k * depth_stride + i * stride]) : 0.0f;
    }
  }
}

// A float's bits, rounded so that the lower half no longer counts. A NaN stays one.
MOESAIC_INLINE uint32_t RoundedBits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : rounded;
}

// See GemmKernels::round.
static void RoundToHalves(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint16_t>(RoundedBits(from[i]) >> 16);
}

// See GemmKernels::round_floats.
static void RoundFloats(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = RoundedBits(values[i]) & 0xFFFF0000;
    __builtin_memcpy(values + i, &bits, sizeof(bits));
  }
}

// Floats of kLanes elements.
MOESAIC_INLINE Vector LoadFloats(const float* from) { return Load(from); }
MOESAIC_INLINE Vector LoadFloats(const uint16_t* from) { return LoadHalves(from); }

// Floats from the first `count` elements; zeros beside them.
template <class Element>
MOESAIC_INLINE Vector LoadPart(const Element* from, int64_t count) {
  Vector part = {};
  for (int64_t lane = 0; lane < count; ++lane) part[lane] = ToFloat(from[lane]);
  return part;
}

// kVectors of c's columns for kRows rows, or of one vector the first `part` columns. Sums begin anew
// after each kBlockDepth, as Gemm's do.
template <int kRows, int kVectors, bool kPart = false>
MOESAIC_INLINE void ThinStrip(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              float* c, int64_t c_stride, int64_t depth, int64_t part = kLanes) {
  Vector totals[kRows][kVectors] = {};
  for (int64_t begin = 0; begin < depth; begin += kBlockDepth) {
    const int64_t end = depth - begin < kBlockDepth ? depth : begin + kBlockDepth;
    Vector sums[kRows][kVectors] = {};
    for (int64_t k = begin; k < end; ++k, b += b_stride) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vector row = kPart ? LoadPart(b, part) : Load(b + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) sums[i][j] += Broadcast(a[i * a_stride + k]) * row;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        totals[i][j] = begin == 0 ? sums[i][j] : totals[i][j] + sums[i][j];
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      if (!kPart) Store(to, totals[i][j]);
      for (int64_t lane = 0; kPart && lane < part; ++lane) to[lane] = totals[i][j][lane];
    }
  }
}

template <int kRows>
static void ThinRows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                     int64_t c_stride, int64_t cols, int64_t depth) {
  constexpr int kVectors = 4;
  int64_t j = 0;
  for (; j + kVectors * kLanes <= cols; j += kVectors * kLanes) {
    ThinStrip<kRows, kVectors>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  }
  for (; j + kLanes <= cols; j += kLanes) {
    ThinStrip<kRows, 1>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  }
  if (j < cols) {
    ThinStrip<kRows, 1, true>(a, a_stride, b + j, b_stride, c + j, c_stride, depth, cols - j);
  }
}

// See GemmKernels::thin.
static void Thin(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                 int64_t c_stride, int64_t rows, int64_t cols, int64_t depth) {
  static constexpr decltype(&ThinRows<1>) kByRows[] = {ThinRows<1>, ThinRows<2>, ThinRows<3>,
                                                       ThinRows<4>};
  static_assert(sizeof(kByRows) / sizeof(kByRows[0]) == kThinRows, "one for each number of rows");
  kByRows[rows - 1](a, a_stride, b, b_stride, c, c_stride, cols, depth);
}

// c[kRows, cols] += a[kRows, kDepth] * b[kDepth, cols], or = where `is_first`. Rows of b are read side
// by side along their whole length, and those that come next are asked for: memory is slow to begin.
template <int kRows, int kDepth, class Element>
static void StreamBlock(const float* a, int64_t a_stride, const Element* b, int64_t b_stride,
                        float* c, int64_t c_stride, int64_t cols, bool is_first) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t part = cols - j;
    Vector rows[kDepth];
#pragma GCC unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const Element* from = b + k * b_stride + j;
      __builtin_prefetch(from + kDepth * b_stride);
      rows[k] = part >= kLanes ? LoadFloats(from) : LoadPart(from, part);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      float* to = c + i * c_stride + j;
      Vector sum = is_first ? Vector{} : part >= kLanes ? Load(to) : LoadPart(to, part);
#pragma GCC unroll 8
      for (int k = 0; k < kDepth; ++k) sum += Broadcast(a[i * a_stride + k]) * rows[k];
      if (part >= kLanes) {
        Store(to, sum);
      } else {
        for (int64_t lane = 0; lane < part; ++lane) to[lane] = sum[lane];
      }
    }
  }
}

constexpr int64_t kStreamCols = 1024;  // whose sums stay in the first-level cache

// c[kRows, cols] = a[kRows, depth] * b[depth, cols], cols <= kStreamCols.
template <int kRows, class Element>
static void Stream(const float* a, int64_t a_stride, const Element* b, int64_t b_stride, float* c,
                   int64_t c_stride, int64_t cols, int64_t depth) {
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    StreamBlock<kRows, 8>(a + k, a_stride, b + k * b_stride, b_stride, c, c_stride, cols, k == 0);
  }
  for (; k < depth; ++k) {
    StreamBlock<kRows, 1>(a + k, a_stride, b + k * b_stride, b_stride, c, c_stride, cols, k == 0);
  }
}

template <int kRows, class Element>
static void StreamRows(const float* a, int64_t a_stride, const Element* b, int64_t b_stride,
                       float* c, int64_t c_stride, int64_t cols, int64_t depth) {
  for (int64_t j = 0; j < cols; j += kStreamCols) {
    const int64_t width = cols - j < kStreamCols ? cols - j : kStreamCols;
    Stream<kRows>(a, a_stride, b + j, b_stride, c + j, c_stride, width, depth);
  }
}

// See GemmKernels::stream.
static void StreamFloats(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         float* c, int64_t c_stride, int64_t rows, int64_t cols, int64_t depth) {
  static constexpr decltype(&StreamRows<1, float>) kByRows[] = {
      StreamRows<1, float>, StreamRows<2, float>, StreamRows<3, float>, StreamRows<4, float>};
  static_assert(sizeof(kByRows) / sizeof(kByRows[0]) == kThinRows, "one for each number of rows");
  kByRows[rows - 1](a, a_stride, b, b_stride, c, c_stride, cols, depth);
}

// See GemmKernels::thin_halves.
static void ThinHalves(const float* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                       float* c, int64_t c_stride, int64_t rows, int64_t cols, int64_t depth) {
  using Half = uint16_t;
  static constexpr decltype(&StreamRows<1, Half>) kByRows[] = {
      StreamRows<1, Half>, StreamRows<2, Half>, StreamRows<3, Half>, StreamRows<4, Half>,
      StreamRows<5, Half>, StreamRows<6, Half>, StreamRows<7, Half>, StreamRows<8, Half>};
  static_assert(sizeof(kByRows) / sizeof(kByRows[0]) == kHalfRows, "one for each number of rows");
  kByRows[rows - 1](a, a_stride, b, b_stride, c, c_stride, cols, depth);
}

MOESAIC_INLINE float SumOfLanes(Vector vector) {
  float lanes[kLanes];
  Store(lanes, vector);
  Vector4 sums = Load4(lanes);
  for (int64_t lane = 4; lane < kLanes; lane += 4) sums += Load4(lanes + lane);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// kCols dot products of each of kRows rows: lanes sum every kLanes-th product.
template <int kRows, int kCols, class Element>
MOESAIC_INLINE void Dots(const float* a, int64_t a_stride, const Element* b, int64_t b_stride,
                         float* c, int64_t c_stride, int64_t depth) {
  Vector sums[kRows][kCols] = {};
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      __builtin_prefetch(b + (j + kCols) * b_stride + k);
      const Vector col = LoadFloats(b + j * b_stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) sums[i][j] += Load(a + i * a_stride + k) * col;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) {
      const int64_t left = depth - whole;
      if (left > 0) {
        sums[i][j] += LoadPart(a + i * a_stride + whole, left) *
                      LoadPart(b + j * b_stride + whole, left);
      }
      c[i * c_stride + j] = SumOfLanes(sums[i][j]);
    }
  }
}

template <int kRows, class Element>
static void DotRows(const float* a, int64_t a_stride, const Element* b, int64_t b_stride, float* c,
                    int64_t c_stride, int64_t cols, int64_t depth) {
  constexpr int kCols = kRows <= 4 ? 4 : 2;
  int64_t j = 0;
  for (; j + kCols <= cols; j += kCols) {
    Dots<kRows, kCols>(a, a_stride, b + j * b_stride, b_stride, c + j, c_stride, depth);
  }
  for (; j < cols; ++j) {
    Dots<kRows, 1>(a, a_stride, b + j * b_stride, b_stride, c + j, c_stride, depth);
  }
}

// See GemmKernels::dot.
static void Dot(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                int64_t c_stride, int64_t rows, int64_t cols, int64_t depth) {
  static constexpr decltype(&DotRows<1, float>) kByRows[] = {DotRows<1, float>, DotRows<2, float>,
                                                             DotRows<3, float>, DotRows<4, float>};
  static_assert(sizeof(kByRows) / sizeof(kByRows[0]) == kThinRows, "one for each number of rows");
  kByRows[rows - 1](a, a_stride, b, b_stride, c, c_stride, cols, depth);
}

// See GemmKernels::dot_halves.
static void DotHalves(const float* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                      float* c, int64_t c_stride, int64_t rows, int64_t cols, int64_t depth) {
  using Half = uint16_t;
  static constexpr decltype(&DotRows<1, Half>) kByRows[] = {
      DotRows<1, Half>, DotRows<2, Half>, DotRows<3, Half>, DotRows<4, Half>,
      DotRows<5, Half>, DotRows<6, Half>, DotRows<7, Half>, DotRows<8, Half>};
  static_assert(sizeof(kByRows) / sizeof(kByRows[0]) == kHalfRows, "one for each number of rows");
  kByRows[rows - 1](a, a_stride, b, b_stride, c, c_stride, cols, depth);
}

extern const GemmKernels kGemmKernels;
const GemmKernels kGemmKernels = {
    MOESAIC_ISA_NAME, kTileRows, kTileCols, Tile, Pack<kTileRows>, Pack<kTileCols>,
    PackHalves<kTileRows>, PackHalves<kTileCols>, RoundToHalves, RoundFloats, Thin,
    StreamFloats, Dot, ThinHalves, DotHalves};

}  // namespace MOESAIC_ISA
}  // namespace moesaic
