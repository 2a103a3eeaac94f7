#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace moesaic {
namespace {

// What a thread packs into; kept for its life, since products follow each other.
struct Scratch {
  alignas(64) float a[kBlockRows * kBlockDepth];
  alignas(64) float b[kBlockDepth * kMaxTileCols];
  alignas(64) float c[kMaxTileRows * kMaxTileCols];
};

Scratch& ThreadScratch() {
  thread_local std::unique_ptr<Scratch> scratch(new Scratch);
  return *scratch;
}

// A tile that is cut by the matrix's edge: computed whole beside it, and what belongs is added.
void EdgeTile(const GemmKernels& kernels, int64_t depth, const float* a, const float* b, float* c,
              int64_t c_stride, int64_t rows, int64_t cols, bool accumulate, float* whole) {
  kernels.tile(depth, a, b, whole, kernels.tile_cols, false);
  for (int64_t i = 0; i < rows; ++i) {
    float* to = c + i * c_stride;
    const float* from = whole + i * kernels.tile_cols;
    if (accumulate) {
      for (int64_t j = 0; j < cols; ++j) to[j] += from[j];
    } else {
      std::memcpy(to, from, cols * sizeof(float));
    }
  }
}

}  // namespace

void Gemm(const GemmKernels& kernels, Matrix a, Matrix b, float* c, int64_t c_stride, int64_t rows,
          int64_t cols, int64_t depth) {
  const auto pack = [&](int64_t k, int64_t block, int64_t col, int64_t width, float* packed) {
    kernels.pack_cols(b.data + k * b.row_stride + col * b.col_stride, b.row_stride, b.col_stride,
                      block, width, packed);
  };
  Gemm(kernels, a, pack, c, c_stride, rows, cols, depth);
}

void Gemm(const GemmKernels& kernels, Matrix a, const PackCols& pack_b, float* c, int64_t c_stride,
          int64_t rows, int64_t cols, int64_t depth) {
  const auto pack = [&](int64_t k, int64_t block, int64_t row, int64_t height, float* packed) {
    kernels.pack_rows(a.data + row * a.row_stride + k * a.col_stride, a.col_stride, a.row_stride,
                      block, height, packed);
  };
  Gemm(kernels, PackRows(pack), pack_b, c, c_stride, rows, cols, depth);
}

void Gemm(const GemmKernels& kernels, const PackRows& pack_a, const PackCols& pack_b, float* c,
          int64_t c_stride, int64_t rows, int64_t cols, int64_t depth) {
  if (depth == 0) {
    for (int64_t i = 0; i < rows; ++i) std::memset(c + i * c_stride, 0, cols * sizeof(float));
    return;
  }
  Scratch& scratch = ThreadScratch();
  const int64_t tile_rows = kernels.tile_rows, tile_cols = kernels.tile_cols;
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    const int64_t block = std::min(kBlockDepth, depth - k);
    for (int64_t i = 0; i < rows; i += tile_rows) {
      pack_a(k, block, i, std::min(tile_rows, rows - i), scratch.a + i * block);
    }
    for (int64_t j = 0; j < cols; j += tile_cols) {
      const int64_t width = std::min(tile_cols, cols - j);
      pack_b(k, block, j, width, scratch.b);
      for (int64_t i = 0; i < rows; i += tile_rows) {
        const int64_t height = std::min(tile_rows, rows - i);
        const float* packed_a = scratch.a + i * block;
        float* tile = c + i * c_stride + j;
        if (height == tile_rows && width == tile_cols) {
          kernels.tile(block, packed_a, scratch.b, tile, c_stride, k > 0);
        } else {
          EdgeTile(kernels, block, packed_a, scratch.b, tile, c_stride, height, width, k > 0,
                   scratch.c);
        }
      }
    }
  }
}

}  // namespace moesaic
