// Products of matrices in bfloat16, with sums in float32.
#ifndef MOESAIC_HALVES_H_
#define MOESAIC_HALVES_H_

#include <cstdint>

#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {

// A matrix in memory, in bfloat16 or in floats that are rounded to it when they are packed: element
// (i, j) is the one of number i * row_stride + j * col_stride. One of the two strides is 1.
struct HalfOperand {
  const void* data;
  bool is_float;
  int64_t row_stride, col_stride;

  HalfOperand From(int64_t row, int64_t col) const {
    const int64_t bytes = (row * row_stride + col * col_stride) * (is_float ? 4 : 2);
    return {static_cast<const char*>(data) + bytes, is_float, row_stride, col_stride};
  }
  HalfOperand Transposed() const { return {data, is_float, col_stride, row_stride}; }
};

// Where a product goes: row-major, in bfloat16 or in floats.
struct HalfResult {
  void* data;
  bool is_float;
  int64_t stride;

  HalfResult From(int64_t row, int64_t col) const {
    const int64_t bytes = (row * stride + col) * (is_float ? 4 : 2);
    return {static_cast<char*>(data) + bytes, is_float, stride};
  }
};

// Rows or columns that are packed together: two tiles.
constexpr int64_t kPairSide = 2 * kTileSide;

// Numbers of a packed pair of so many inputs: for each 32 inputs, two tiles.
constexpr int64_t PairSize(int64_t depth) { return TileSteps(depth) * 2 * kTileSize; }
// Sums of a pair of rows and one of columns.
constexpr int64_t kPairSums = kPairSide * kPairSide;

// What tile registers bring; see isa_amx_halves.cc.
struct HalfTileKernels {
  // Packs the first `count` <= kPairSide rows of a left operand, or columns of a right one, with
  // zeros beside them.
  void (*pack_left)(const HalfOperand& a, int64_t count, int64_t depth, uint16_t* to);
  void (*pack_right)(const HalfOperand& b, int64_t count, int64_t depth, uint16_t* to);
  // y[rows, cols] = a * b of rows <= kPairSide, packed, and packed pairs of columns that lie b_pair
  // apart. Of a depth that comes in blocks, the first begins sums, [pairs of columns, kPairSums],
  // and the last makes y of them.
  void (*product)(const uint16_t* a, const uint16_t* b, int64_t b_pair, int64_t depth,
                  int64_t rows, int64_t cols, const HalfResult& y, float* sums, bool is_first,
                  bool is_last);
};

// Those of the instruction set in use; nullptr: it has none.
const HalfTileKernels* CurrentHalfTiles();

// One group's product: y[rows, cols] = a[rows, depth] * b[depth, cols].
struct HalfProduct {
  HalfOperand a, b;
  HalfResult y;
  int64_t rows, depth;
};

// All groups' products, of as many columns each; zeros where depth is 0.
void MultiplyHalves(xla::ffi::ThreadPool& pool, const HalfProduct* products, int64_t count,
                    int64_t cols);

}  // namespace moesaic

#endif  // MOESAIC_HALVES_H_
