// Products of ragged groups of rows, each with its own matrix, and their two backward contractions.
//
// R rows sorted by group, E groups, D and F widths; float32.
#include <cstdint>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// y[r] = x[r] * w[group of r], or with its transpose. w is [E, D, F]; x is [R, D] and y [R, F], or
// the other way round. Rows past the last group are zero. A row's bits don't depend on how many rows
// there are: sums have the order that Gemm has.
ffi::Error RowsTimesMatrix(ffi::ThreadPool pool, F32 x, F32 w, S32 group_sizes,
                           ffi::ResultBuffer<ffi::F32> y, bool transpose) {
  const int64_t num_rows = x.dimensions()[0], depth = x.dimensions()[1];
  const int64_t cols = y->dimensions()[1], d = w.dimensions()[1], f = w.dimensions()[2];
  if (depth != (transpose ? f : d) || cols != (transpose ? d : f)) {
    return ffi::Error::InvalidArgument("x, w and y don't fit each other");
  }
  auto starts_or = Starts(group_sizes, num_rows);
  if (!starts_or.has_value()) return starts_or.error();
  const std::vector<int64_t>& starts = *starts_or;
  const GemmKernels& kernels = *CurrentIsa().gemm;
  const std::vector<Task> tasks = CutIntoTasks(Sizes(starts), cols, kernels, pool.num_threads());
  ParallelFor(pool, tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    const int64_t row = starts[task.group] + task.row;
    const float* w_group = w.typed_data() + task.group * d * f;
    float* c = y->typed_data() + row * cols + task.col;
    if (task.rows <= kThinRows && !transpose) {
      kernels.thin(x.typed_data() + row * depth, depth, w_group + task.col, f, c, cols, task.rows,
                   task.cols, depth);
      return;
    }
    const Matrix a = {x.typed_data() + row * depth, depth, 1};
    const Matrix b = transpose ? Matrix{w_group + task.col * f, 1, f}
                               : Matrix{w_group + task.col, f, 1};
    Gemm(kernels, a, b, c, cols, task.rows, task.cols, depth);
  });
  const int64_t used = starts.back();
  std::memset(y->typed_data() + used * cols, 0, (num_rows - used) * cols * sizeof(float));
  return ffi::Error::Success();
}

// dw[e] = sum over the group's rows of x[r]^T dy[r]: x [R, D], dy [R, F], dw [E, D, F].
ffi::Error RowsTimesRows(ffi::ThreadPool pool, F32 x, F32 dy, S32 group_sizes,
                         ffi::ResultBuffer<ffi::F32> dw) {
  const int64_t num_rows = x.dimensions()[0], d = x.dimensions()[1], f = dy.dimensions()[1];
  if (dy.dimensions()[0] != static_cast<int64_t>(num_rows)) {
    return ffi::Error::InvalidArgument("x and dy have different numbers of rows");
  }
  auto starts_or = Starts(group_sizes, num_rows);
  if (!starts_or.has_value()) return starts_or.error();
  const std::vector<int64_t>& starts = *starts_or;
  const GemmKernels& kernels = *CurrentIsa().gemm;
  const std::vector<int64_t> group_rows(starts.size() - 1, d);
  const std::vector<Task> tasks = CutIntoTasks(group_rows, f, kernels, pool.num_threads());
  ParallelFor(pool, tasks.size(), [&](int64_t index) {
    const Task& task = tasks[index];
    const int64_t begin = starts[task.group], rows = starts[task.group + 1] - begin;
    const Matrix a = {x.typed_data() + begin * d + task.row, 1, d};
    const Matrix b = {dy.typed_data() + begin * f + task.col, f, 1};
    float* c = dw->typed_data() + (task.group * d + task.row) * f + task.col;
    Gemm(kernels, a, b, c, f, task.rows, task.cols, rows);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_rows_times_matrix, moesaic::RowsTimesMatrix,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("transpose"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_rows_times_rows, moesaic::RowsTimesRows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

#pragma GCC visibility pop
