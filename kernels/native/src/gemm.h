// Float32 matrix products of blocks that fit a core's caches.
#ifndef MOESAIC_GEMM_H_
#define MOESAIC_GEMM_H_

#include <cstdint>
#include <functional>

namespace moesaic {

// Rows of A and depth (inputs) that are packed at once: A's block stays in the second-level cache,
// a panel of B's columns in the first.
constexpr int64_t kBlockRows = 360;
constexpr int64_t kBlockDepth = 256;
constexpr int64_t kMaxTileRows = 12;
constexpr int64_t kMaxTileCols = 32;
constexpr int64_t kThinRows = 4;
constexpr int64_t kHalfRows = 8;

// A matrix in memory: element (i, j) lies at data[i * row_stride + j * col_stride]. One of the two
// strides must be 1.
struct Matrix {
  const float* data;
  int64_t row_stride;
  int64_t col_stride;
};

// What one instruction set brings; see gemm_kernels.inl.
struct GemmKernels {
  const char* isa;
  int64_t tile_rows;  // of A, divides kBlockRows
  int64_t tile_cols;  // of B, a multiple of 16
  // c[tile_rows, tile_cols] = a * b, or c += a * b. a is packed [depth, tile_rows], b [depth,
  // tile_cols].
  void (*tile)(int64_t depth, const float* a, const float* b, float* c, int64_t c_stride,
               bool accumulate);
  // Packs `width` <= tile_rows (of A) or tile_cols (of B) vectors of `depth` elements as
  // [depth, tile], zeros beside them. Element (k, i) lies at source[k * depth_stride + i * stride],
  // and one of the strides is 1.
  void (*pack_rows)(const float* source, int64_t depth_stride, int64_t stride, int64_t depth,
                    int64_t width, float* packed);
  void (*pack_cols)(const float* source, int64_t depth_stride, int64_t stride, int64_t depth,
                    int64_t width, float* packed);
  // The same from bfloat16.
  void (*pack_half_rows)(const uint16_t* source, int64_t depth_stride, int64_t stride,
                         int64_t depth, int64_t width, float* packed);
  void (*pack_half_cols)(const uint16_t* source, int64_t depth_stride, int64_t stride,
                         int64_t depth, int64_t width, float* packed);
  // Floats to the nearest in bfloat16, ties to even, which is what they become; or stay floats.
  void (*round)(const float* from, int64_t count, uint16_t* to);
  void (*round_floats)(float* values, int64_t count);
  // c[rows, cols] = a[rows, depth] * b[depth, cols] for rows <= kThinRows, with b's rows read where
  // they lie: so few rows would not repay packing them. Sums begin anew after each kBlockDepth, so
  // that a row's bits are Gemm's.
  void (*thin)(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
               int64_t c_stride, int64_t rows, int64_t cols, int64_t depth);
  // The same with sums in another order, for a large b, whose rows are read along their length.
  void (*stream)(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                 int64_t c_stride, int64_t rows, int64_t cols, int64_t depth);
  // And where b is [cols, depth].
  void (*dot)(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
              int64_t c_stride, int64_t rows, int64_t cols, int64_t depth);
  // The last two for rows <= kHalfRows where b is bfloat16; a row's bits don't depend on the others.
  void (*thin_halves)(const float* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                      float* c, int64_t c_stride, int64_t rows, int64_t cols, int64_t depth);
  void (*dot_halves)(const float* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                     float* c, int64_t c_stride, int64_t rows, int64_t cols, int64_t depth);
};

// Packs a[row : row + height, k : k + depth] as [depth, tile_rows], zeros beside it; k and depth as
// below.
using PackRows =
    std::function<void(int64_t k, int64_t depth, int64_t row, int64_t height, float* packed)>;

// Packs b[k : k + depth, col : col + width] as [depth, tile_cols], zeros beside it; k and depth are
// multiples of kBlockDepth but for the last, col is one of tile_cols.
using PackCols =
    std::function<void(int64_t k, int64_t depth, int64_t col, int64_t width, float* packed)>;

// c[rows, cols] = a[rows, depth] * b[depth, cols]; zeros where depth is 0. rows <= kBlockRows.
// Runs on the calling thread.
void Gemm(const GemmKernels& kernels, const PackRows& pack_a, const PackCols& pack_b, float* c,
          int64_t c_stride, int64_t rows, int64_t cols, int64_t depth);
void Gemm(const GemmKernels& kernels, Matrix a, const PackCols& pack_b, float* c, int64_t c_stride,
          int64_t rows, int64_t cols, int64_t depth);
void Gemm(const GemmKernels& kernels, Matrix a, Matrix b, float* c, int64_t c_stride, int64_t rows,
          int64_t cols, int64_t depth);

}  // namespace moesaic

#endif  // MOESAIC_GEMM_H_
