// Products of many rows in tile registers (AMX), whose operands are bfloat16 and whose sums float32.
#ifndef MOESAIC_TILES_H_
#define MOESAIC_TILES_H_

#include <cstdint>
#include <functional>

#include "quantized.h"

#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MOESAIC_HAS_AMX
#endif

namespace moesaic {

// Rows of a tile of x and columns of one of w; a panel of quantised weights has as many.
constexpr int64_t kTileSide = 16;
// Inputs of a tile, and bfloat16 numbers of one.
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileSize = kTileSide * kTileDepth;
// Parts of a float32 whose sum is within 2^-16 of it; one bfloat16 alone is within 2^-8.
constexpr int kMaxParts = 2;

// Inputs rounded up to whole tiles; those beyond are zero in both operands.
constexpr int64_t TileSteps(int64_t inputs) { return (inputs + kTileDepth - 1) / kTileDepth; }

// Rows of x, each as `parts` rows of bfloat16, the greatest part first; aligned to 64 bytes. Of
// kTileSide rows more than are asked for, the memory can be read.
struct TileRows {
  const uint16_t* values;  // [rows, parts, Width()]
  int64_t inputs;
  int parts;

  int64_t Width() const { return TileSteps(inputs) * kTileDepth; }
  TileRows From(int64_t row) const { return {values + row * parts * Width(), inputs, parts}; }
};

// A matrix in bfloat16: element (k, n) lies at data[k * row_stride + n * col_stride]. One of the two
// strides is 1.
struct HalfMatrix {
  const uint16_t* data;
  int64_t row_stride, col_stride;
};

// What one instruction set brings; see isa_amx.cc.
struct TileKernels {
  // One row of x for TileRows.
  void (*round)(const float* x, int64_t inputs, int parts, uint16_t* to);
  // A panel of w, 16 columns, as tiles: [TileSteps, parts, 512].
  void (*pack)(const QuantizedMatrix& w, int64_t panel, int parts, uint16_t* to);
  // The same of 16 columns of bfloat16 from `col` on, which are one part.
  void (*pack_halves)(const HalfMatrix& w, int64_t inputs, int64_t col, uint16_t* to);
  // y[rows, cols] = x * w, where w is panels one after the other. cols is a multiple of 16.
  void (*product)(const TileRows& x, const uint16_t* w, int w_parts, int64_t rows, int64_t cols,
                  float* y, int64_t y_stride);
};

// Columns of w that are made tiles of at a time: a multiple of 32 that a second-level cache holds.
int64_t TileCols(int64_t inputs, int parts);

// y[rows, cols] = x * w by the CurrentTiles(); pack(col, to) makes a panel from column `col` on. cols
// is a multiple of 16, at most TileCols.
using PackTiles = std::function<void(int64_t col, uint16_t* to)>;
void TileProduct(const TileRows& x, const PackTiles& pack, int w_parts, int64_t rows, int64_t cols,
                 float* y, int64_t y_stride);

// Whether processor, system and compiler have tile registers; asks the system for them.
bool HasTiles();

// Those of the instruction set in use; nullptr: it has none.
const TileKernels* CurrentTiles();

}  // namespace moesaic

#endif  // MOESAIC_TILES_H_
