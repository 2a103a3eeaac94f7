#include "tasks.h"

#include <algorithm>
#include <string>

namespace moesaic {
namespace {

// Tasks a thread should find, so that the last to finish keeps the others waiting little.
constexpr int64_t kTasksPerThread = 4;

int64_t RoundUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace

std::vector<Task> CutIntoTasks(const std::vector<int64_t>& group_rows, int64_t cols,
                               const GemmKernels& kernels, int64_t num_threads,
                               int64_t min_cols, RowBlocks row_blocks) {
  int64_t num_blocks = 0;
  for (int64_t rows : group_rows) num_blocks += (rows + row_blocks.most - 1) / row_blocks.most;
  const int64_t wanted = kTasksPerThread * num_threads;
  const int64_t strips = num_blocks ? std::max<int64_t>(1, wanted / num_blocks) : 1;
  const int64_t strip = RoundUp(std::max(min_cols, (cols + strips - 1) / strips), kernels.tile_cols);
  std::vector<Task> tasks;
  for (size_t group = 0; group < group_rows.size(); ++group) {
    const int64_t rows = group_rows[group];
    const int64_t blocks = (rows + row_blocks.most - 1) / row_blocks.most;
    if (blocks == 0) continue;
    const int64_t block = RoundUp((rows + blocks - 1) / blocks, row_blocks.tile);
    for (int64_t row = 0; row < rows; row += block) {
      for (int64_t col = 0; col < cols; col += strip) {
        tasks.push_back({static_cast<int64_t>(group), row, std::min(block, rows - row), col,
                         std::min(strip, cols - col)});
      }
    }
  }
  return tasks;
}

std::vector<Task> CutIntoTasks(const std::vector<int64_t>& group_rows, int64_t cols,
                               const GemmKernels& kernels, int64_t num_threads,
                               int64_t min_cols) {
  return CutIntoTasks(group_rows, cols, kernels, num_threads, min_cols,
                      {kBlockRows, kernels.tile_rows});
}

xla::ffi::ErrorOr<std::vector<int64_t>> Starts(const xla::ffi::Buffer<xla::ffi::S32>& group_sizes,
                                               int64_t num_rows) {
  std::vector<int64_t> starts = {0};
  for (size_t e = 0; e < group_sizes.element_count(); ++e) {
    const int64_t size = group_sizes.typed_data()[e];
    if (size < 0 || starts.back() + size > num_rows) {
      return xla::ffi::Unexpected(xla::ffi::Error::InvalidArgument(
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

}  // namespace moesaic
