// Products of ragged groups of float32 rows with matrices in bfloat16, which are read as stored.
//
// R rows sorted by group, E groups, K inputs, N outputs.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "tasks.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using BF16 = ffi::Buffer<ffi::BF16>;
using S32 = ffi::Buffer<ffi::S32>;

// From this many rows of a group on average, tiles of its matrix are worth making.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBlockRows = 512;
// And from which floats are, where there are no tiles: of outputs first they are turned round.
constexpr int64_t kPackedRows = 16, kPackedRowsTurned = 128;
// Bytes of weights that are worth another thread's claim.
constexpr int64_t kTaskBytes = 32 << 10;

// What a product makes of x where it takes tiles: kernels/grouped_matmul/api.py.
constexpr int64_t kAuto = 2;

// x in tiles' form, kept by the thread that calls.
TileRows RoundRows(ffi::ThreadPool& pool, const float* x, int64_t rows, int64_t inputs, int parts) {
  thread_local Buffer buffer;
  buffer.Trim();
  TileRows tiles = {nullptr, inputs, parts};
  const int64_t width = tiles.Width() * parts;
  uint16_t* values = buffer.Get<uint16_t>((rows + kTileSide) * width);
  ParallelFor(pool, (rows + kTileSide - 1) / kTileSide, [&](int64_t index) {
    const int64_t end = std::min(rows, (index + 1) * kTileSide);
    for (int64_t row = index * kTileSide; row < end; ++row) {
      CurrentTiles()->round(x + row * inputs, inputs, parts, values + row * width);
    }
  });
  tiles.values = values;
  return tiles;
}

// y[rows, cols] = x[rows, inputs] * w from column `col` on, a few rows at a time.
void ThinProduct(const float* x, int64_t inputs, const HalfMatrix& w, int64_t rows, int64_t col,
                 int64_t cols, float* y, int64_t y_stride) {
  const GemmKernels& kernels = *CurrentIsa().gemm;
  const bool is_outputs_first = w.row_stride == 1 && w.col_stride != 1;
  const auto product = is_outputs_first ? kernels.dot_halves : kernels.thin_halves;
  const int64_t stride = is_outputs_first ? w.col_stride : w.row_stride;
  for (int64_t i = 0; i < rows; i += kHalfRows) {
    product(x + i * inputs, inputs, w.data + col * w.col_stride, stride, y + i * y_stride, y_stride,
            std::min(kHalfRows, rows - i), cols, inputs);
  }
}

// y[rows, cols] of rows in tiles.
void TiledProduct(const TileRows& x, const HalfMatrix& w, int64_t rows, int64_t col, int64_t cols,
                  float* y, int64_t y_stride) {
  const int64_t most = TileCols(x.inputs, 1);
  for (int64_t i = 0; i < cols; i += most) {
    const auto pack = [&](int64_t j, uint16_t* to) {
      CurrentTiles()->pack_halves(w, x.inputs, col + i + j, to);
    };
    TileProduct(x, pack, 1, rows, std::min(most, cols - i), y + i, y_stride);
  }
}

// y[rows, cols] of so many rows that w is packed as floats.
void PackedProduct(const float* x, int64_t inputs, const HalfMatrix& w, int64_t rows, int64_t col,
                   int64_t cols, float* y, int64_t y_stride) {
  const GemmKernels& kernels = *CurrentIsa().gemm;
  const auto pack = [&](int64_t k, int64_t depth, int64_t j, int64_t width, float* packed) {
    kernels.pack_half_cols(w.data + k * w.row_stride + (col + j) * w.col_stride, w.row_stride,
                           w.col_stride, depth, width, packed);
  };
  Gemm(kernels, Matrix{x, inputs, 1}, pack, y, y_stride, rows, cols, inputs);
}

// y[r] = x[r] * w[group of r]; w is [E, K, N], or outputs first [E, N, K]. Rows past the last group
// are zero.
ffi::Error Bfloat16Matmul(ffi::ThreadPool pool, F32 x, BF16 w, S32 group_sizes,
                          ffi::ResultBuffer<ffi::F32> y, int64_t activations, bool fixed_order,
                          bool outputs_first) {
  const int64_t num_rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = y->dimensions()[1];
  if (w.dimensions()[outputs_first ? 2 : 1] != inputs ||
      w.dimensions()[outputs_first ? 1 : 2] != outputs) {
    return ffi::Error::InvalidArgument("x, w and y don't fit each other");
  }
  auto starts_or = Starts(group_sizes, num_rows);
  if (!starts_or.has_value()) return starts_or.error();
  const std::vector<int64_t>& starts = *starts_or;
  const std::vector<int64_t> sizes = Sizes(starts);
  // Those of all groups alike: a row's bits may not depend on how many others went to its group.
  const int64_t groups = sizes.size();
  const bool is_tiled = CurrentTiles() != nullptr && !fixed_order && outputs % kTileSide == 0 &&
                        num_rows >= kTileRows * groups;
  const int64_t packed_rows = outputs_first ? kPackedRowsTurned : kPackedRows;
  const bool is_packed = !is_tiled && !fixed_order && num_rows >= packed_rows * groups;
  TileRows tiles = {};
  if (is_tiled) {
    const int parts = activations == kAuto ? 1 : kMaxParts;
    tiles = RoundRows(pool, x.typed_data(), starts.back(), inputs, parts);
  }
  const int64_t column_bytes = 2 * std::max<int64_t>(1, inputs * std::min(num_rows, kHalfRows));
  const GemmKernels& kernels = *CurrentIsa().gemm;
  const std::vector<Task> tasks =
      is_packed ? CutIntoTasks(sizes, outputs, kernels, pool.num_threads())
                : CutIntoTasks(sizes, outputs, kernels, pool.num_threads(),
                               kTaskBytes / column_bytes, {kTileBlockRows, 2 * kTileSide});
  ParallelFor(pool, tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    const int64_t row = starts[task.group] + task.row;
    const uint16_t* data = reinterpret_cast<const uint16_t*>(w.typed_data());
    const uint16_t* of_group = data + task.group * inputs * outputs;
    const HalfMatrix matrix = outputs_first ? HalfMatrix{of_group, 1, inputs}
                                            : HalfMatrix{of_group, outputs, 1};
    float* to = y->typed_data() + row * outputs + task.col;
    if (is_tiled) {
      TiledProduct(tiles.From(row), matrix, task.rows, task.col, task.cols, to, outputs);
    } else {
      const auto product = is_packed ? PackedProduct : ThinProduct;
      product(x.typed_data() + row * inputs, inputs, matrix, task.rows, task.col, task.cols, to,
              outputs);
    }
  });
  const int64_t used = starts.back();
  std::memset(y->typed_data() + used * outputs, 0, (num_rows - used) * outputs * sizeof(float));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_bfloat16_matmul, moesaic::Bfloat16Matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("activations")
                                  .Attr<bool>("fixed_order")
                                  .Attr<bool>("outputs_first"));

#pragma GCC visibility pop
