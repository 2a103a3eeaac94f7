// Rounding matrices of floats into panels of few bits.
//
// G matrices, K inputs, N outputs, S blocks of inputs.
#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "quantized.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;

// values [G, N, K * bits / 8], scales [G, N / 16, S, 16] and offsets, as scales or none, of w
// [G, K, N] or, outputs first, [G, N, K].
ffi::Error Quantize(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> w, ffi::Result<ffi::AnyBuffer> values,
                    ffi::Result<ffi::AnyBuffer> scales, ffi::Result<ffi::AnyBuffer> offsets,
                    float largest, float least, float found_again, bool outputs_first,
                    ffi::Span<const float> steps) {
  const auto shape = w.dimensions(), stored = values->dimensions(), kept = scales->dimensions();
  const ffi::DataType type = values->element_type(), scale_type = scales->element_type();
  if (shape.size() != 3 || stored.size() != 3 || kept.size() != 4 || steps.size() == 0 ||
      !(type == ffi::S8 || type == ffi::U8 || type == ffi::F8E4M3FN) ||
      !(scale_type == ffi::BF16 || scale_type == ffi::F32)) {
    return ffi::Error::InvalidArgument(
        "w must be a stack of matrices, values of 4 or 8 bits, scales float32 or bfloat16");
  }
  Rounding rounding = {};
  rounding.format = type == ffi::S8   ? Format::kInt8
                    : type == ffi::U8 ? Format::kInt4
                                      : Format::kE4m3;
  rounding.least = least;
  rounding.largest = largest;
  rounding.steps = steps.begin();
  rounding.num_steps = steps.size();
  rounding.found_again = found_again;
  rounding.is_affine = offsets->element_count() > 0;
  rounding.are_scales_bfloat16 = scale_type == ffi::BF16;
  const int64_t inputs = shape[outputs_first ? 2 : 1], outputs = shape[outputs_first ? 1 : 2];
  const int64_t panels = outputs / kPanelOutputs, blocks = kept[2];
  const int64_t row_bytes = inputs * BitsOf(rounding.format) / 8;
  rounding.block = blocks == 0 ? 0 : inputs / blocks;
  if (outputs % kPanelOutputs || blocks == 0 || inputs % blocks || rounding.block % 8 ||
      rounding.block > kMostBlockInputs || stored[0] != shape[0] || stored[1] != outputs ||
      stored[2] != row_bytes || kept[0] != shape[0] || kept[1] != panels ||
      kept[3] != kPanelOutputs ||
      (rounding.is_affine && (offsets->element_type() != scale_type ||
                              offsets->element_count() != scales->element_count()))) {
    return ffi::Error::InvalidArgument(
        "panels need outputs in sixteens, blocks of at most 128 inputs in eights, an offset for each "
        "scale or none");
  }
  const int64_t panel_bytes = blocks * kPanelOutputs * (rounding.are_scales_bfloat16 ? 2 : 4);
  const int64_t input_stride = outputs_first ? 1 : outputs, output_stride = outputs_first ? inputs : 1;
  ParallelFor(pool, shape[0] * panels, [&](int64_t task) {
    const int64_t matrix = task / panels, panel = task % panels;
    const float* from =
        w.typed_data() + matrix * inputs * outputs + panel * kPanelOutputs * output_stride;
    CurrentIsa().quantized->quantize_panel(
        rounding, from, input_stride, output_stride, inputs,
        static_cast<uint8_t*>(values->untyped_data()) + task * kPanelOutputs * row_bytes,
        static_cast<char*>(scales->untyped_data()) + task * panel_bytes,
        rounding.is_affine ? static_cast<char*>(offsets->untyped_data()) + task * panel_bytes
                           : nullptr);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_quantize, moesaic::Quantize,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("largest")
                                  .Attr<float>("least")
                                  .Attr<float>("found_again")
                                  .Attr<bool>("outputs_first")
                                  .Attr<xla::ffi::Span<const float>>("steps"));

#pragma GCC visibility pop
