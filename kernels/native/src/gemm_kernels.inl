// The inner parts of a matrix product for one instruction set.
//
// The including file defines MOESAIC_ISA (a name), MOESAIC_VECTOR_BYTES, MOESAIC_TILE_ROWS and
// MOESAIC_TILE_VECTORS, so that the tile's sums, a row of B and a broadcast of A fill the registers.

namespace moesaic {
namespace MOESAIC_ISA {

#include "vector.inl"

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

// kVectors of c's columns for kRows rows.
template <int kRows, int kVectors>
MOESAIC_INLINE void ThinStrip(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              float* c, int64_t c_stride, int64_t depth) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vector row = Load(b + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sums[i][j] += Broadcast(a[i * a_stride + k]) * row;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) Store(c + i * c_stride + j * kLanes, sums[i][j]);
  }
}

template <int kRows>
static void ThinRows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                     int64_t c_stride, int64_t cols, int64_t depth) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= cols; j += 4 * kLanes) {
    ThinStrip<kRows, 4>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  }
  for (; j + kLanes <= cols; j += kLanes) {
    ThinStrip<kRows, 1>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  }
  for (; j < cols; ++j) {
    for (int i = 0; i < kRows; ++i) {
      float sum = 0.0f;
      for (int64_t k = 0; k < depth; ++k) sum += a[i * a_stride + k] * b[k * b_stride + j];
      c[i * c_stride + j] = sum;
    }
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

extern const GemmKernels kGemmKernels;
const GemmKernels kGemmKernels = {MOESAIC_ISA_NAME, kTileRows,       kTileCols, Tile,
                                  Pack<kTileRows>,  Pack<kTileCols>, Thin};

}  // namespace MOESAIC_ISA
}  // namespace moesaic
