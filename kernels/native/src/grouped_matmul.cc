// Products of ragged groups of rows, each with its own matrix, and their two backward contractions.
//
// R rows sorted by group, E groups, D and F widths; float32.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// A part of one group's output that a thread computes at a time.
struct Task {
  int64_t group;
  int64_t row, rows;  // of the group's output
  int64_t col, cols;
};

// Tasks a thread should find, so that the last to finish keeps the others waiting little.
constexpr int64_t kTasksPerThread = 4;

// Cuts the groups' outputs, group_rows[e] x cols, into blocks of rows, and these into strips of
// columns only as far as there would be too few tasks: B is packed again for each block of rows, A
// for each strip.
std::vector<Task> CutIntoTasks(const std::vector<int64_t>& group_rows, int64_t cols,
                               const GemmKernels& kernels, int64_t num_threads) {
  int64_t num_blocks = 0;
  for (int64_t rows : group_rows) num_blocks += (rows + kBlockRows - 1) / kBlockRows;
  const int64_t wanted = kTasksPerThread * num_threads;
  const int64_t strips = num_blocks ? std::max<int64_t>(1, wanted / num_blocks) : 1;
  const auto round_up = [](int64_t x, int64_t to) { return (x + to - 1) / to * to; };
  const int64_t strip = round_up((cols + strips - 1) / strips, kernels.tile_cols);
  std::vector<Task> tasks;
  for (size_t group = 0; group < group_rows.size(); ++group) {
    const int64_t rows = group_rows[group];
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    if (blocks == 0) continue;
    const int64_t block = round_up((rows + blocks - 1) / blocks, kernels.tile_rows);
    for (int64_t row = 0; row < rows; row += block) {
      for (int64_t col = 0; col < cols; col += strip) {
        tasks.push_back({static_cast<int64_t>(group), row, std::min(block, rows - row), col,
                         std::min(strip, cols - col)});
      }
    }
  }
  return tasks;
}

// Where each group's rows begin, and at the end how many rows all groups have.
ffi::ErrorOr<std::vector<int64_t>> Starts(const S32& group_sizes, int64_t num_rows) {
  std::vector<int64_t> starts = {0};
  for (size_t e = 0; e < group_sizes.element_count(); ++e) {
    const int64_t size = group_sizes.typed_data()[e];
    if (size < 0 || starts.back() + size > num_rows) {
      return ffi::Unexpected(ffi::Error::InvalidArgument(
          "group_sizes[" + std::to_string(e) + "] is " + std::to_string(size) + " after " +
          std::to_string(starts.back()) + " rows: sizes must be at least 0 and sum to at most " +
          std::to_string(num_rows)));
    }
    starts.push_back(starts.back() + size);
  }
  return starts;
}

std::vector<int64_t> Sizes(const std::vector<int64_t>& starts) {
  std::vector<int64_t> sizes;
  for (size_t e = 0; e + 1 < starts.size(); ++e) sizes.push_back(starts[e + 1] - starts[e]);
  return sizes;
}

// y[r] = x[r] * w[group of r], or with its transpose. w is [E, D, F]; x is [R, D] and y [R, F], or
// the other way round. Rows past the last group are zero.
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
    const Matrix a = {x.typed_data() + row * depth, depth, 1};
    const Matrix b = transpose ? Matrix{w_group + task.col * f, 1, f}
                               : Matrix{w_group + task.col, f, 1};
    Gemm(kernels, a, b, y->typed_data() + row * cols + task.col, cols, task.rows, task.cols, depth);
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
