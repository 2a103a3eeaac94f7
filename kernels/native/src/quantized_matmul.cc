// Products of ragged groups of rows with quantised matrices, plain and as a gated pair (SwiGLU).
//
// R rows sorted by group, E groups, K inputs, N outputs; x and y are float32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "quantized.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// From this many rows on, weights are made floats once per block and multiplied as such.
constexpr int64_t kGemmRows = 24;

// Bytes of weights, times rows of x, that are worth another thread's claim, and below which one
// thread alone is done sooner.
constexpr int64_t kTaskBytes = 32 << 10;
constexpr int64_t kAloneBytes = 128 << 10;

// The matrices of all groups.
struct Weights {
  const uint8_t* values;
  const char* scales;
  bool are_scales_bfloat16;
  int64_t groups, inputs, outputs, block;
  Format format;

  int64_t RowBytes() const { return inputs * BitsOf(format) / 8; }

  QuantizedMatrix Of(int64_t group) const {
    const int64_t scale_bytes = are_scales_bfloat16 ? 2 : 4;
    return {values + group * outputs * RowBytes(),
            scales + group * (inputs / block) * outputs * scale_bytes,
            are_scales_bfloat16,
            inputs,
            outputs,
            block,
            format};
  }
};

// x as the kernels take it: as it is, and in digits where these are used.
struct Rows {
  const float* exact;
  int64_t inputs, blocks;
  int digits;  // 1, kExactDigits, or 0: there are none
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  RoundedRows Rounded(int64_t row) const {
    return {values.data() + row * digits * inputs, scales.data() + row * blocks,
            sums.data() + row * digits * blocks, digits};
  }
};

Rows RowsOf(ffi::ThreadPool& pool, const F32& x, const Weights& weights, int digits) {
  const int64_t num_rows = x.dimensions()[0];
  Rows rows = {x.typed_data(), weights.inputs, weights.inputs / weights.block, digits, {}, {}, {}};
  if (digits == 0) return rows;
  rows.values.resize(num_rows * digits * rows.inputs);
  rows.scales.resize(num_rows * rows.blocks);
  rows.sums.resize(num_rows * digits * rows.blocks);
  const auto round_row = [&](int64_t row) {
    CurrentIsa().quantized->round(rows.exact + row * rows.inputs, rows.inputs, weights.block,
                                  digits, rows.values.data() + row * digits * rows.inputs,
                                  rows.scales.data() + row * rows.blocks,
                                  rows.sums.data() + row * digits * rows.blocks);
  };
  if (num_rows <= kMaxRows) {
    for (int64_t row = 0; row < num_rows; ++row) round_row(row);
  } else {
    ParallelFor(pool, num_rows, round_row);
  }
  return rows;
}

// Whether a task is done sooner with floats in digits.
bool PrefersDigits(const Task& task, Format format) {
  return format != Format::kE4m3 && task.rows <= CurrentIsa().quantized->digit_rows;
}

// Digits of x for these tasks.
int DigitsFor(const std::vector<Task>& tasks, Format format, bool round) {
  if (round) return 1;
  const auto prefers = [&](const Task& task) { return PrefersDigits(task, format); };
  return std::any_of(tasks.begin(), tasks.end(), prefers) ? kExactDigits : 0;
}

// y[rows, cols] from column `col` of w on, through floats.
void FloatProduct(const QuantizedMatrix& w, const Rows& x, int64_t row, int64_t rows, int64_t col,
                  int64_t cols, float* y, int64_t y_stride) {
  const Isa& isa = CurrentIsa();
  const int64_t tile_cols = isa.gemm->tile_cols;
  const auto pack = [&](int64_t k, int64_t depth, int64_t j, int64_t width, float* packed) {
    if (width < tile_cols) std::memset(packed, 0, depth * tile_cols * sizeof(float));
    for (int64_t i = 0; i < width; i += kPanelOutputs) {
      isa.quantized->dequantize(w, (col + j + i) / kPanelOutputs, k, depth, packed + i, tile_cols);
    }
  };
  const Matrix a = {x.exact + row * x.inputs, x.inputs, 1};
  Gemm(*isa.gemm, a, pack, y, y_stride, rows, cols, w.inputs);
}

// y[rows, cols] of one task, from column `first` of w on.
void Product(const QuantizedMatrix& w, const Rows& x, int64_t row, const Task& task, int64_t first,
             float* y, int64_t y_stride) {
  const QuantizedKernels& kernels = *CurrentIsa().quantized;
  const bool takes_digits = x.digits == 1 || PrefersDigits(task, w.format);
  if (task.rows >= kGemmRows && !takes_digits) {
    FloatProduct(w, x, row, task.rows, first, task.cols, y, y_stride);
    return;
  }
  for (int64_t col = 0; col < task.cols; col += kPanelOutputs) {
    const int64_t panel = (first + col) / kPanelOutputs;
    for (int64_t i = 0; i < task.rows; i += kMaxRows) {
      const int64_t rows = std::min(kMaxRows, task.rows - i);
      float* to = y + i * y_stride + col;
      if (takes_digits) {
        kernels.panel_rounded(w, panel, x.Rounded(row + i), rows, to, y_stride);
      } else {
        kernels.panel(w, panel, x.exact + (row + i) * x.inputs, rows, to, y_stride);
      }
    }
  }
}

// gate becomes silu(gate) * up; both [rows, cols], of which up lies together.
void Gate(float* gate, int64_t gate_stride, const float* up, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i, gate += gate_stride, up += cols) {
    for (int64_t j = 0; j < cols; ++j) gate[j] *= up[j] / (1.0f + std::exp(-gate[j]));
  }
}

// The weights in these buffers, or why they are none.
ffi::ErrorOr<Weights> WeightsOf(const ffi::AnyBuffer& values, const ffi::AnyBuffer& scales,
                                int64_t block) {
  const auto shape = values.dimensions(), scale_shape = scales.dimensions();
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
  return weights;
}

// y[r] = x[r] * w[group of r]; gated, silu of the first half of the outputs times the second. Rows
// past the last group are zero.
ffi::Error QuantizedMatmul(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer values,
                           ffi::AnyBuffer scales, S32 group_sizes, ffi::ResultBuffer<ffi::F32> y,
                           int64_t block, bool gated, bool round) {
  const auto weights_or = WeightsOf(values, scales, block);
  if (!weights_or.has_value()) return weights_or.error();
  const Weights& weights = *weights_or;
  const int64_t num_rows = x.dimensions()[0], outputs = y->dimensions()[1];
  const int64_t matrices = gated ? 2 : 1;
  if (x.dimensions()[1] != weights.inputs || outputs * matrices != weights.outputs ||
      outputs % kPanelOutputs || (round && weights.format == Format::kE4m3) ||
      static_cast<int64_t>(group_sizes.element_count()) != weights.groups) {
    return ffi::Error::InvalidArgument("x, the weights and y don't fit each other");
  }
  auto starts_or = Starts(group_sizes, num_rows);
  if (!starts_or.has_value()) return starts_or.error();
  const std::vector<int64_t>& starts = *starts_or;
  const int64_t column_bytes = std::max<int64_t>(
      1, matrices * weights.RowBytes() * std::min(num_rows, kMaxRows));
  const bool is_alone = column_bytes * outputs < kAloneBytes;
  const int64_t min_cols = is_alone ? outputs : kTaskBytes / column_bytes;
  const std::vector<Task> tasks =
      CutIntoTasks(Sizes(starts), outputs, *CurrentIsa().gemm, pool.num_threads(), min_cols);
  const Rows rows = RowsOf(pool, x, weights, DigitsFor(tasks, weights.format, round));
  ParallelFor(pool, tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    const QuantizedMatrix w = weights.Of(task.group);
    const int64_t row = starts[task.group] + task.row;
    float* to = y->typed_data() + row * outputs + task.col;
    Product(w, rows, row, task, task.col, to, outputs);
    if (gated) {
      std::vector<float> up(task.rows * task.cols);
      Product(w, rows, row, task, outputs + task.col, up.data(), task.cols);
      Gate(to, outputs, up.data(), task.rows, task.cols);
    }
  });
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
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("block")
                                  .Attr<bool>("gated")
                                  .Attr<bool>("round"));

#pragma GCC visibility pop
