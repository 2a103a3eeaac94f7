// Ragged groups of rows, and the parts of their products that threads share out.
#ifndef MOESAIC_TASKS_H_
#define MOESAIC_TASKS_H_

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {

// A part of one group's output that a thread computes at a time.
struct Task {
  int64_t group;
  int64_t row, rows;  // of the group's output
  int64_t col, cols;
};

// How rows are cut: blocks of at most so many, but for the last a multiple of a kernel's tile.
struct RowBlocks {
  int64_t most, tile;
};

// Cuts the groups' outputs, group_rows[e] x cols, into blocks of rows, and these into strips of
// columns only as far as there would be too few tasks: B is packed again for each block of rows, A
// for each strip. A strip has at least min_cols columns: claiming one costs too. A block has at
// most `row_blocks.most` rows.
std::vector<Task> CutIntoTasks(const std::vector<int64_t>& group_rows, int64_t cols,
                               const GemmKernels& kernels, int64_t num_threads,
                               int64_t min_cols, RowBlocks row_blocks);
// The same with blocks that Gemm takes.
std::vector<Task> CutIntoTasks(const std::vector<int64_t>& group_rows, int64_t cols,
                               const GemmKernels& kernels, int64_t num_threads,
                               int64_t min_cols = 1);

// Where each group's rows begin, and at the end how many rows all groups have.
xla::ffi::ErrorOr<std::vector<int64_t>> Starts(const xla::ffi::Buffer<xla::ffi::S32>& group_sizes,
                                               int64_t num_rows);

// Rows of each group, of what Starts returned.
std::vector<int64_t> Sizes(const std::vector<int64_t>& starts);

}  // namespace moesaic

#endif  // MOESAIC_TASKS_H_
