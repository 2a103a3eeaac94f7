// Products of ragged groups of rows with quantised matrices, plain and as a gated pair (SwiGLU).
//
// R rows sorted by group, E groups, K inputs, N outputs; x and y are float32.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "quantized.h"
#include "tasks.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// From this many rows of a group on average, weights are made floats once per block and multiplied as
// such; and made tiles, where the processor has them, of one part or of kMaxParts.
constexpr int64_t kGemmRows = 24;
constexpr int64_t kTileRows[kMaxParts] = {24, 16};
// Up to this many, one row after the other is faster than some at once.
constexpr int64_t kLoneRows = 2;

// Bytes of weights, times rows of x, that are worth another thread's claim, and below which one
// thread alone is done sooner.
constexpr int64_t kTaskBytes = 32 << 10;
constexpr int64_t kAloneBytes = 128 << 10;

// Rows of a task in tiles.
constexpr int64_t kTileBlockRows = 512;

// Bytes of the panels that a few rows after others meet, and of weights made 16 bits for more rows.
constexpr int64_t kStripBytes = 64 << 10;
constexpr int64_t kWideBytes = 20 << 10;

// What a product makes of x; kernels/grouped_matmul/api.py.
enum class Activations : int64_t { kFloat, kInt8, kAuto };

// The matrices of all groups.
struct Weights {
  const uint8_t* values;
  const char* scales;
  const char* offsets;  // null: none
  bool are_scales_bfloat16;
  int64_t groups, inputs, outputs, block;
  Format format;

  int64_t RowBytes() const { return inputs * BitsOf(format) / 8; }

  QuantizedMatrix Of(int64_t group) const {
    const int64_t skipped = group * (inputs / block) * outputs * (are_scales_bfloat16 ? 2 : 4);
    return {values + group * outputs * RowBytes(),
            scales + skipped,
            offsets == nullptr ? nullptr : offsets + skipped,
            are_scales_bfloat16,
            inputs,
            outputs,
            block,
            format};
  }
};

// How rows are multiplied, those of all groups alike: a row's bits may not depend on how many others
// went to its group.
enum class Way {
  kLone,     // x as it is, with panels made floats in registers, row by row
  kExact,    // the same of several rows at once
  kDigits,   // x in kExactDigits of 8 bits
  kWords,    // x in 16 bits
  kRounded,  // x rounded to 8 bits
  kFloats,   // x as it is, with blocks of panels made floats in memory
  kTiles,    // x and weights in one part or in kMaxParts of bfloat16
};

struct Method {
  Format format;
  int64_t block;
  Activations activations;
  bool fixed_order;  // a row's bits may not depend on how many rows there are

  // Whether x keeps 8 bits: where more would matter little beside what the weights have lost, which
  // those of 8 whole bits have not (docs/cpu.md).
  bool IsRounded() const {
    return activations == Activations::kInt8 ||
           (activations == Activations::kAuto && format != Format::kInt8);
  }

  // Whether 16 bits are enough.
  bool TakesWords() const {
    return activations == Activations::kAuto && format == Format::kInt8 && block <= kMostWordInputs;
  }

  // Of bfloat16, in tiles.
  int Parts() const { return IsRounded() ? 1 : kMaxParts; }

  // Of so many rows of a group on average.
  Way Of(int64_t rows) const {
    const QuantizedKernels& kernels = *CurrentIsa().quantized;
    const bool is_whole = format != Format::kE4m3;
    if (activations == Activations::kInt8) return Way::kRounded;
    if (!fixed_order && CurrentTiles() != nullptr && rows >= kTileRows[Parts() - 1]) {
      return Way::kTiles;
    }
    if (is_whole && IsRounded()) return Way::kRounded;
    if (TakesWords()) return Way::kWords;
    if (fixed_order) return is_whole ? Way::kDigits : Way::kExact;
    if (is_whole && rows <= kernels.digit_rows) return Way::kDigits;
    if (rows >= kGemmRows) return Way::kFloats;
    return rows <= kLoneRows ? Way::kLone : Way::kExact;
  }
};

// x as its way takes it.
struct Rows {
  const float* exact;
  int64_t inputs, blocks;
  int digits;  // 1 or kExactDigits
  int8_t* values;
  int16_t* words;
  float* scales;
  int32_t* starts;
  float* sums;  // of each block, [rows, blocks], for weights with offsets; else null
  TileRows tiles;

  RoundedRows Rounded(int64_t row) const {
    return {values + row * digits * inputs, scales + row * blocks, starts + row * digits * blocks,
            digits};
  }

  WordRows Words(int64_t row) const { return {words + row * inputs, scales + row * blocks}; }
};

// Where the thread that calls keeps rows, and where each keeps what it works on.
struct Scratch {
  Buffer values, scales, starts, sums, halves, up, wide;

  static Scratch& OfThread() {
    thread_local Scratch scratch;
    return scratch;
  }

  void Trim() {
    for (Buffer* buffer : {&values, &scales, &starts, &sums, &halves}) buffer->Trim();
  }
};

Rows PrepareRows(ffi::ThreadPool& pool, const float* x, const Weights& weights, int64_t num_rows,
                 Way way, int parts) {
  const bool is_rounded = way == Way::kDigits || way == Way::kRounded;
  Rows rows = {};
  rows.exact = x;
  rows.inputs = weights.inputs;
  rows.blocks = weights.inputs / weights.block;
  rows.digits = way == Way::kDigits ? kExactDigits : 1;
  rows.tiles = {nullptr, weights.inputs, parts};
  Scratch& scratch = Scratch::OfThread();
  if (is_rounded) {
    rows.values = scratch.values.Get<int8_t>(num_rows * rows.digits * rows.inputs);
    rows.scales = scratch.scales.Get<float>(num_rows * rows.blocks);
    rows.starts = scratch.starts.Get<int32_t>(num_rows * rows.digits * rows.blocks);
  }
  if (way == Way::kWords) {
    rows.words = scratch.values.Get<int16_t>(num_rows * rows.inputs);
    rows.scales = scratch.scales.Get<float>(num_rows * rows.blocks);
  }
  const int64_t half_width = rows.tiles.Width() * parts;
  uint16_t* halves = nullptr;
  if (way == Way::kTiles) {
    halves = scratch.halves.Get<uint16_t>((num_rows + kTileSide) * half_width);
    rows.tiles.values = halves;
  }
  if (weights.offsets != nullptr) {
    rows.sums = scratch.sums.Get<float>(num_rows * rows.blocks);
  } else if (!is_rounded && way != Way::kTiles && way != Way::kWords) {
    return rows;
  }
  // A few rows at a time, all of one thread where there are no more.
  const int64_t chunk = kMaxRows;
  ParallelFor(pool, (num_rows + chunk - 1) / chunk, [&](int64_t index) {
    const int64_t first = index * chunk, end = std::min(first + chunk, num_rows);
    for (int64_t row = first; row < end; ++row) {
      const float* from = x + row * rows.inputs;
      if (rows.sums != nullptr) {
        CurrentIsa().quantized->sum_blocks(from, weights.Of(0), rows.sums + row * rows.blocks);
      }
      if (way == Way::kTiles) {
        CurrentTiles()->round(from, rows.inputs, parts, halves + row * half_width);
      } else if (way == Way::kWords) {
        CurrentIsa().quantized->round_words(from, weights.Of(0), rows.words + row * rows.inputs,
                                            rows.scales + row * rows.blocks);
      } else if (is_rounded) {
        CurrentIsa().quantized->round(from, weights.Of(0), rows.digits,
                                      rows.values + row * rows.digits * rows.inputs,
                                      rows.scales + row * rows.blocks,
                                      rows.starts + row * rows.digits * rows.blocks);
      }
    }
  });
  return rows;
}

// y[rows, cols] from column `first` of w on, through floats.
void FloatProduct(const QuantizedMatrix& w, const Rows& x, int64_t row, int64_t rows, int64_t first,
                  int64_t cols, float* y, int64_t y_stride) {
  const Isa& isa = CurrentIsa();
  const int64_t tile_cols = isa.gemm->tile_cols;
  const auto pack = [&](int64_t k, int64_t depth, int64_t j, int64_t width, float* packed) {
    if (width < tile_cols) std::memset(packed, 0, depth * tile_cols * sizeof(float));
    for (int64_t i = 0; i < width; i += kPanelOutputs) {
      isa.quantized->dequantize(w, (first + j + i) / kPanelOutputs, k, depth, packed + i, tile_cols);
    }
  };
  const Matrix a = {x.exact + row * x.inputs, x.inputs, 1};
  Gemm(*isa.gemm, a, pack, y, y_stride, rows, cols, w.inputs);
}

// Panel after panel, whose weights become floats or meet whole numbers in registers. A few rows meet
// all panels of a strip before the next ones do: what they write lies together.
void PanelStrip(const QuantizedMatrix& w, const Rows& x, Way way, int64_t row, int64_t rows,
                int64_t first, int64_t cols, float* y, int64_t y_stride) {
  const QuantizedKernels& kernels = *CurrentIsa().quantized;
  const int64_t chunk = way == Way::kLone     ? 1
                        : way == Way::kDigits ? kernels.digit_chunk
                        : way == Way::kWords  ? kernels.word_chunk
                                              : kMaxRows;
  for (int64_t i = 0; i < rows; i += chunk) {
    const int64_t count = std::min(chunk, rows - i);
    for (int64_t col = 0; col < cols; col += kPanelOutputs) {
      const int64_t panel = (first + col) / kPanelOutputs;
      float* to = y + i * y_stride + col;
      if (way == Way::kLone) {
        kernels.panel_of_one(w, panel, x.exact + (row + i) * x.inputs, to);
      } else if (way == Way::kExact) {
        kernels.panel(w, panel, x.exact + (row + i) * x.inputs, count, to, y_stride);
      } else if (way == Way::kWords) {
        kernels.panel_words(w, panel, x.Words(row + i), count, to, y_stride);
      } else {
        kernels.panel_rounded(w, panel, x.Rounded(row + i), count, to, y_stride);
      }
    }
  }
}

void PanelProduct(const QuantizedMatrix& w, const Rows& x, Way way, int64_t row, int64_t rows,
                  int64_t first, int64_t cols, float* y, int64_t y_stride) {
  const int64_t panel_bytes = kPanelOutputs * w.inputs * BitsOf(w.format) / 8;
  const int64_t strip = std::max<int64_t>(1, kStripBytes / panel_bytes) * kPanelOutputs;
  for (int64_t col = 0; col < cols; col += strip) {
    PanelStrip(w, x, way, row, rows, first + col, std::min(strip, cols - col), y + col, y_stride);
  }
}

// More than a few rows meet some panels' weights as 16 bits, a part of the inputs after the other.
void WideProduct(const QuantizedMatrix& w, const Rows& x, int64_t row, int64_t rows, int64_t first,
                 int64_t cols, float* y, int64_t y_stride) {
  const QuantizedKernels& kernels = *CurrentIsa().quantized;
  const int64_t panel_words = w.block * kPanelOutputs;  // of a block
  const int64_t wanted =
      std::max<int64_t>(1, kWideBytes / (kernels.wide_panels * panel_words * sizeof(int16_t)));
  const int64_t parts = (x.blocks + wanted - 1) / wanted, most = (x.blocks + parts - 1) / parts;
  for (int64_t col = 0, panels; col < cols; col += panels * kPanelOutputs) {
    panels = cols - col < kernels.wide_panels * kPanelOutputs ? 1 : kernels.wide_panels;
    const int64_t panel = (first + col) / kPanelOutputs;
    for (int64_t block = 0; block < x.blocks; block += most) {
      const int64_t blocks = std::min(most, x.blocks - block);
      int16_t* words = Scratch::OfThread().wide.Get<int16_t>(panels * blocks * panel_words);
      for (int64_t i = 0; i < panels; ++i) {
        kernels.widen(w, panel + i, block * w.block, blocks * w.block,
                      words + i * blocks * panel_words);
      }
      const WideBlocks wide = {words, panel, panels, block, blocks};
      for (int64_t i = 0; i < rows; i += kernels.word_tile_rows) {
        kernels.tile_words(w, wide, x.Words(row + i), std::min(kernels.word_tile_rows, rows - i),
                           y + i * y_stride + col, y_stride);
      }
    }
  }
}

void ProductWithoutOffsets(const QuantizedMatrix& w, const Rows& x, Way way, int64_t row,
                           int64_t rows, int64_t first, int64_t cols, float* y, int64_t y_stride) {
  const int parts = x.tiles.parts;
  const auto pack = [&](int64_t col, uint16_t* to) {
    CurrentTiles()->pack(w, (first + col) / kPanelOutputs, parts, to);
  };
  if (way == Way::kWords && rows > kMaxRows) {
    return WideProduct(w, x, row, rows, first, cols, y, y_stride);
  }
  switch (way) {
    case Way::kTiles: return TileProduct(x.tiles.From(row), pack, parts, rows, cols, y, y_stride);
    case Way::kFloats: return FloatProduct(w, x, row, rows, first, cols, y, y_stride);
    default: return PanelProduct(w, x, way, row, rows, first, cols, y, y_stride);
  }
}

// y[rows, cols] of one group from column `first` of w on.
void Product(const QuantizedMatrix& w, const Rows& x, Way way, int64_t row, int64_t rows,
             int64_t first, int64_t cols, float* y, int64_t y_stride) {
  ProductWithoutOffsets(w, x, way, row, rows, first, cols, y, y_stride);
  if (w.offsets == nullptr) return;
  for (int64_t col = 0; col < cols; col += kPanelOutputs) {
    CurrentIsa().quantized->add_offsets(w, (first + col) / kPanelOutputs, x.sums + row * x.blocks,
                                        rows, y + col, y_stride);
  }
}

// One task; gated, the second half of w's outputs are those of up.
void RunTask(const QuantizedMatrix& w, const Rows& x, Way way, int64_t row, const Task& task,
             bool gated, float* y, int64_t outputs) {
  const int64_t most = way == Way::kTiles ? TileCols(w.inputs, x.tiles.parts) : task.cols;
  for (int64_t i = 0; i < task.cols; i += most) {
    const int64_t col = task.col + i, cols = std::min(most, task.cols - i);
    Product(w, x, way, row, task.rows, col, cols, y + col, outputs);
    if (!gated) continue;
    float* up = Scratch::OfThread().up.Get<float>(task.rows * cols);
    Product(w, x, way, row, task.rows, outputs + col, cols, up, cols);
    for (int64_t k = 0; k < task.rows; ++k) {
      CurrentIsa().quantized->gate(y + k * outputs + col, up + k * cols, cols);
    }
  }
}

// The weights in these buffers, or why they are none.
ffi::ErrorOr<Weights> WeightsOf(const ffi::AnyBuffer& values, const ffi::AnyBuffer& scales,
                                const ffi::AnyBuffer& offsets, int64_t block) {
  const auto shape = values.dimensions(), scale_shape = scales.dimensions();
  const bool has_offsets = offsets.element_count() > 0;
  const bool is_bfloat16 = scales.element_type() == ffi::BF16;
  const ffi::DataType type = values.element_type();
  if (shape.size() != 3 || scale_shape.size() != 4 ||
      !(type == ffi::S8 || type == ffi::U8 || type == ffi::F8E4M3FN) ||
      !(is_bfloat16 || scales.element_type() == ffi::F32)) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "values and scales must be stacks of 4 or 8 bits and of float32 or bfloat16"));
  }
  const Format format = type == ffi::S8   ? Format::kInt8
                        : type == ffi::U8 ? Format::kInt4
                                          : Format::kE4m3;
  const Weights weights = {static_cast<const uint8_t*>(values.untyped_data()),
                           static_cast<const char*>(scales.untyped_data()),
                           has_offsets ? static_cast<const char*>(offsets.untyped_data()) : nullptr,
                           is_bfloat16,
                           shape[0],
                           shape[2] * 8 / BitsOf(format),
                           shape[1],
                           block,
                           format};
  if (block <= 0 || block % 8 || weights.inputs % block || weights.outputs % kPanelOutputs ||
      scale_shape[0] != shape[0] || scale_shape[1] != shape[1] / kPanelOutputs ||
      scale_shape[2] != weights.inputs / block || scale_shape[3] != kPanelOutputs) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "packed panels need outputs in sixteens, blocks of inputs in eights, a scale per block"));
  }
  if (has_offsets && (offsets.element_type() != scales.element_type() ||
                      offsets.element_count() != scales.element_count())) {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("offsets must be as many as scales, in their dtype"));
  }
  return weights;
}

// y[r] = x[r] * w[group of r]; gated, silu of the first half of the outputs times the second. Rows
// past the last group are zero.
ffi::Error QuantizedMatmul(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer values,
                           ffi::AnyBuffer scales, ffi::AnyBuffer offsets, S32 group_sizes,
                           ffi::ResultBuffer<ffi::F32> y, int64_t activations, int64_t block,
                           bool fixed_order, bool gated) {
  const auto weights_or = WeightsOf(values, scales, offsets, block);
  if (!weights_or.has_value()) return weights_or.error();
  const Weights& weights = *weights_or;
  const Method method = {weights.format, block, static_cast<Activations>(activations), fixed_order};
  const int64_t num_rows = x.dimensions()[0], outputs = y->dimensions()[1];
  const int64_t matrices = gated ? 2 : 1;
  if (x.dimensions()[1] != weights.inputs || outputs * matrices != weights.outputs ||
      outputs % kPanelOutputs ||
      (method.activations == Activations::kInt8 && weights.format == Format::kE4m3) ||
      static_cast<int64_t>(group_sizes.element_count()) != weights.groups) {
    return ffi::Error::InvalidArgument("x, the weights and y don't fit each other");
  }
  auto starts_or = Starts(group_sizes, num_rows);
  if (!starts_or.has_value()) return starts_or.error();
  const std::vector<int64_t>& starts = *starts_or;
  const std::vector<int64_t> sizes = Sizes(starts);
  const int64_t groups = std::max<int64_t>(1, weights.groups);
  const Way way = method.Of((num_rows + groups - 1) / groups);
  const int64_t column_bytes = std::max<int64_t>(
      1, matrices * weights.RowBytes() * std::min(num_rows, kMaxRows));
  const bool is_alone = column_bytes * outputs < kAloneBytes;
  const int64_t min_cols = is_alone ? outputs : kTaskBytes / column_bytes;
  const GemmKernels& gemm = *CurrentIsa().gemm;
  const RowBlocks row_blocks = way == Way::kTiles ? RowBlocks{kTileBlockRows, 2 * kTileSide}
                                                 : RowBlocks{kBlockRows, gemm.tile_rows};
  const std::vector<Task> tasks =
      CutIntoTasks(sizes, outputs, gemm, pool.num_threads(), min_cols, row_blocks);
  const Rows rows =
      PrepareRows(pool, x.typed_data(), weights, starts.back(), way, method.Parts());
  ParallelFor(pool, tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    const int64_t row = starts[task.group] + task.row;
    RunTask(weights.Of(task.group), rows, way, row, task, gated,
            y->typed_data() + row * outputs, outputs);
  });
  Scratch::OfThread().Trim();
  const int64_t used = starts.back();
  std::memset(y->typed_data() + used * outputs, 0, (num_rows - used) * outputs * sizeof(float));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_quantized_matmul, moesaic::QuantizedMatmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("activations")
                                  .Attr<int64_t>("block")
                                  .Attr<bool>("fixed_order")
                                  .Attr<bool>("gated"));

#pragma GCC visibility pop
