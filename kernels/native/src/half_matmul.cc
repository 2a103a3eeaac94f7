// Products of ragged groups of rows in bfloat16 with a matrix each, and their backward contractions:
// sums in float32, results in bfloat16 or float32.
//
// R rows sorted by group, E groups, D and F widths. A matrix in floats is rounded as it is packed.
#include <cstdint>
#include <cstring>
#include <vector>

#include "halves.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using BF16 = ffi::Buffer<ffi::BF16>;
using S32 = ffi::Buffer<ffi::S32>;

bool IsFloat(const ffi::AnyBuffer& buffer) { return buffer.element_type() == ffi::F32; }

bool IsKnown(const ffi::AnyBuffer& buffer) {
  return IsFloat(buffer) || buffer.element_type() == ffi::BF16;
}

// y[r] = x[r] * w[group of r], or with its transpose. w is [E, D, F]; x is [R, D] and y [R, F], or
// the other way round. Rows past the last group are zero.
ffi::Error RowsTimesMatrix(ffi::ThreadPool pool, BF16 x, ffi::AnyBuffer w, S32 group_sizes,
                           ffi::Result<ffi::AnyBuffer> y, bool transpose) {
  const int64_t num_rows = x.dimensions()[0], depth = x.dimensions()[1];
  const int64_t cols = y->dimensions()[1], d = w.dimensions()[1], f = w.dimensions()[2];
  if (depth != (transpose ? f : d) || cols != (transpose ? d : f) || !IsKnown(w) || !IsKnown(*y)) {
    return ffi::Error::InvalidArgument("x, w and y don't fit each other");
  }
  auto starts_or = Starts(group_sizes, num_rows);
  if (!starts_or.has_value()) return starts_or.error();
  const std::vector<int64_t>& starts = *starts_or;
  const HalfOperand left = {x.untyped_data(), false, depth, 1};
  const HalfOperand stack = {w.untyped_data(), IsFloat(w), f, 1};  // of E D rows
  const HalfResult to = {y->untyped_data(), IsFloat(*y), cols};
  std::vector<HalfProduct> products;
  for (size_t e = 0; e + 1 < starts.size(); ++e) {
    const HalfOperand matrix = stack.From(e * d, 0);
    products.push_back({left.From(starts[e], 0), transpose ? matrix.Transposed() : matrix,
                        to.From(starts[e], 0), starts[e + 1] - starts[e], depth});
  }
  MultiplyHalves(pool, products.data(), products.size(), cols);
  const int64_t used = starts.back();
  std::memset(to.From(used, 0).data, 0, (num_rows - used) * cols * (to.is_float ? 4 : 2));
  return ffi::Error::Success();
}

// dw[e] = sum over the group's rows of x[r]^T dy[r]: x [R, D], dy [R, F], dw [E, D, F].
ffi::Error RowsTimesRows(ffi::ThreadPool pool, BF16 x, BF16 dy, S32 group_sizes,
                         ffi::Result<ffi::AnyBuffer> dw) {
  const int64_t num_rows = x.dimensions()[0], d = x.dimensions()[1], f = dy.dimensions()[1];
  if (dy.dimensions()[0] != num_rows || !IsKnown(*dw)) {
    return ffi::Error::InvalidArgument("x, dy and dw don't fit each other");
  }
  auto starts_or = Starts(group_sizes, num_rows);
  if (!starts_or.has_value()) return starts_or.error();
  const std::vector<int64_t>& starts = *starts_or;
  const HalfOperand left = {x.untyped_data(), false, 1, d};
  const HalfOperand right = {dy.untyped_data(), false, f, 1};
  const HalfResult to = {dw->untyped_data(), IsFloat(*dw), f};
  std::vector<HalfProduct> products;
  for (size_t e = 0; e + 1 < starts.size(); ++e) {
    products.push_back({left.From(0, starts[e]), right.From(starts[e], 0), to.From(e * d, 0), d,
                        starts[e + 1] - starts[e]});
  }
  MultiplyHalves(pool, products.data(), products.size(), f);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_half_rows_times_matrix, moesaic::RowsTimesMatrix,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("transpose"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_half_rows_times_rows, moesaic::RowsTimesRows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());

#pragma GCC visibility pop
