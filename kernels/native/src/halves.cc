#include "halves.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "tasks.h"

namespace moesaic {
namespace {

// Packed columns that stay in a second-level cache, bytes, and those of a pair of rows that stay in
// the first.
constexpr int64_t kStripBytes = 2 << 20;
constexpr int64_t kBlockDepthOfTiles = 512;
// Rows of a task, whose sums stay in a second-level cache, too.
constexpr int64_t kTaskRows = 128;
constexpr int64_t kTasksPerThread = 4;

int64_t Pairs(int64_t count) { return (count + kPairSide - 1) / kPairSide; }

void Zero(const HalfResult& y, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memset(y.From(i, 0).data, 0, cols * (y.is_float ? sizeof(float) : sizeof(uint16_t)));
  }
}

// --- Tiles ---------------------------------------------------------------------------------------

// Pairs of columns of a strip, of which there shall be at least so many.
int64_t StripPairs(int64_t cols, int64_t depth, int64_t strips) {
  const int64_t bytes = PairSize(depth) * sizeof(uint16_t);
  const int64_t most = std::clamp<int64_t>(kStripBytes / bytes, 1, Pairs(cols));
  const int64_t count = std::max((Pairs(cols) + most - 1) / most, std::min(strips, Pairs(cols)));
  return (Pairs(cols) + count - 1) / count;
}

// A part of a product that a thread computes at a time: some rows of a strip of columns.
struct TileTask {
  int64_t product, strip, strip_pairs;
  int64_t row, rows;
};

// Strip by strip, so that a thread packs most of them once.
std::vector<TileTask> TileTasks(const HalfProduct* products, int64_t count, int64_t cols,
                                int64_t num_threads) {
  int64_t blocks = 0;
  for (int64_t e = 0; e < count; ++e) blocks += (products[e].rows + kTaskRows - 1) / kTaskRows;
  const int64_t strips = blocks ? kTasksPerThread * num_threads / blocks : 1;
  std::vector<TileTask> tasks;
  for (int64_t e = 0; e < count; ++e) {
    const HalfProduct& product = products[e];
    if (product.depth == 0) continue;
    const int64_t pairs = StripPairs(cols, product.depth, strips);
    for (int64_t strip = 0; strip * pairs < Pairs(cols); ++strip) {
      for (int64_t row = 0; row < product.rows; row += kTaskRows) {
        tasks.push_back({e, strip, pairs, row, std::min(kTaskRows, product.rows - row)});
      }
    }
  }
  return tasks;
}

// A strip of columns, packed for the thread that asks; it may be what it packed last.
const uint16_t* PackStrip(const HalfProduct& product, const TileTask& task, int64_t cols,
                          int64_t call) {
  struct Strip {
    int64_t call = -1, product = -1, strip = -1;
    Buffer buffer;
  };
  thread_local Strip kept;
  const int64_t pair = PairSize(product.depth);
  uint16_t* packed = kept.buffer.Get<uint16_t>(task.strip_pairs * pair);
  if (kept.call == call && kept.product == task.product && kept.strip == task.strip) return packed;
  kept.call = call, kept.product = task.product, kept.strip = task.strip;
  for (int64_t i = 0; i < task.strip_pairs; ++i) {
    const int64_t col = (task.strip * task.strip_pairs + i) * kPairSide;
    if (col >= cols) break;
    CurrentHalfTiles()->pack_right(product.b.From(0, col), std::min(kPairSide, cols - col),
                                   product.depth, packed + i * pair);
  }
  return packed;
}

void RunTileTask(const HalfProduct& product, const TileTask& task, int64_t cols, int64_t call) {
  thread_local Buffer left, kept_sums;
  const HalfTileKernels& kernels = *CurrentHalfTiles();
  const uint16_t* right = PackStrip(product, task, cols, call);
  const int64_t col = task.strip * task.strip_pairs * kPairSide;
  const int64_t width = std::min(task.strip_pairs * kPairSide, cols - col);
  const int64_t depth = product.depth, sums_size = Pairs(width) * kPairSums;
  const bool is_cut = depth > kBlockDepthOfTiles;
  float* sums = kept_sums.Get<float>(is_cut ? Pairs(task.rows) * sums_size : 0);
  uint16_t* packed = left.Get<uint16_t>(PairSize(kBlockDepthOfTiles));
  for (int64_t k = 0; k < depth; k += kBlockDepthOfTiles) {
    const int64_t block = std::min(kBlockDepthOfTiles, depth - k);
    for (int64_t i = 0; i < task.rows; i += kPairSide) {
      const int64_t row = task.row + i, count = std::min(kPairSide, task.rows - i);
      kernels.pack_left(product.a.From(row, k), count, block, packed);
      kernels.product(packed, right + PairSize(k), PairSize(depth), block, count, width,
                      product.y.From(row, col), is_cut ? sums + i / kPairSide * sums_size : nullptr,
                      k == 0, k + block == depth);
    }
  }
}

// --- Floats --------------------------------------------------------------------------------------

// Blocks as packed for Gemm: what is in bfloat16 is widened, and floats are rounded to it.
void PackFloats(const HalfOperand& from, bool is_left, int64_t depth, int64_t count,
                float* packed) {
  const GemmKernels& kernels = *CurrentIsa().gemm;
  const int64_t depth_stride = is_left ? from.col_stride : from.row_stride;
  const int64_t stride = is_left ? from.row_stride : from.col_stride;
  if (!from.is_float) {
    const auto pack = is_left ? kernels.pack_half_rows : kernels.pack_half_cols;
    pack(static_cast<const uint16_t*>(from.data), depth_stride, stride, depth, count, packed);
    return;
  }
  const auto pack = is_left ? kernels.pack_rows : kernels.pack_cols;
  pack(static_cast<const float*>(from.data), depth_stride, stride, depth, count, packed);
  kernels.round_floats(packed, depth * (is_left ? kernels.tile_rows : kernels.tile_cols));
}

void FloatTask(const HalfProduct& product, const Task& task) {
  const GemmKernels& kernels = *CurrentIsa().gemm;
  const auto pack_rows = [&](int64_t k, int64_t depth, int64_t row, int64_t count, float* packed) {
    PackFloats(product.a.From(task.row + row, k), true, depth, count, packed);
  };
  const auto pack_cols = [&](int64_t k, int64_t depth, int64_t col, int64_t count, float* packed) {
    PackFloats(product.b.From(k, task.col + col), false, depth, count, packed);
  };
  const HalfResult y = product.y.From(task.row, task.col);
  float* sums = y.is_float ? static_cast<float*>(y.data) : ThreadScratch(task.rows * task.cols);
  const int64_t stride = y.is_float ? y.stride : task.cols;
  Gemm(kernels, pack_rows, pack_cols, sums, stride, task.rows, task.cols, product.depth);
  for (int64_t i = 0; !y.is_float && i < task.rows; ++i) {
    kernels.round(sums + i * stride, task.cols, static_cast<uint16_t*>(y.From(i, 0).data));
  }
}

}  // namespace

void MultiplyHalves(xla::ffi::ThreadPool& pool, const HalfProduct* products, int64_t count,
                    int64_t cols) {
  std::vector<int64_t> rows;
  for (int64_t e = 0; e < count; ++e) {
    rows.push_back(products[e].depth == 0 ? 0 : products[e].rows);
    if (products[e].depth == 0) Zero(products[e].y, products[e].rows, cols);
  }
  if (CurrentHalfTiles() != nullptr) {
    static std::atomic<int64_t> calls{0};
    const int64_t call = calls.fetch_add(1, std::memory_order_relaxed);
    const std::vector<TileTask> tasks = TileTasks(products, count, cols, pool.num_threads());
    ParallelFor(pool, tasks.size(), [&](int64_t index) {
      RunTileTask(products[tasks[index].product], tasks[index], cols, call);
    });
    return;
  }
  const std::vector<Task> tasks = CutIntoTasks(rows, cols, *CurrentIsa().gemm, pool.num_threads());
  ParallelFor(pool, tasks.size(), [&](int64_t index) {
    FloatTask(products[tasks[index].group], tasks[index]);
  });
}

#if defined(MOESAIC_HAS_AMX)

namespace amx {
extern const HalfTileKernels kHalfTileKernels;
}

const HalfTileKernels* CurrentHalfTiles() {
  return CurrentTiles() != nullptr ? &amx::kHalfTileKernels : nullptr;
}

#else

const HalfTileKernels* CurrentHalfTiles() { return nullptr; }

#endif

}  // namespace moesaic
