#include "cached_attention.h"

#include <algorithm>
#include <string>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// Queries that share a group's keys at a time, and all queries of a tile: what a task works on
// stays in the second-level cache.
constexpr int64_t kGroupQueries = 192;
constexpr int64_t kTileQueries = 768;
// Floats of partial results that wait for each thread.
constexpr int64_t kWaitingFloats = 1 << 18;
// Tasks that a thread should find: the last to finish keeps the others waiting little.
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kFinishTokens = 32;

// What a thread works on at a time: neighbouring parts of a tile's row.
struct Task {
  int64_t tile, part, count;
  int64_t at;  // of its results, in floats
};

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument(message); }

bool FindType(ffi::DataType type, Stored* stored) {
  switch (type) {
    case ffi::F32: *stored = Stored::kFloat32; return true;
    case ffi::BF16: *stored = Stored::kBFloat16; return true;
    case ffi::S8: *stored = Stored::kInt8; return true;
    default: return false;
  }
}

// Keys or values [., ., G, stored_width] and their scales [., ., G], or empty ones.
ffi::ErrorOr<StoredRows> Rows(const ffi::AnyBuffer& x, const ffi::AnyBuffer& scales,
                              int64_t width) {
  StoredRows rows = {};
  const auto dims = x.dimensions();
  if (dims.size() != 4 || !FindType(x.element_type(), &rows.type)) {
    return ffi::Unexpected(Invalid("keys and values must be float32, bfloat16 or int8 of 4 dims"));
  }
  rows.data = x.untyped_data();
  rows.stored_width = dims[3];
  rows.width = width > 0 ? width : dims[3];
  if (rows.type == Stored::kInt8) {
    const bool is_bfloat16 = scales.element_type() == ffi::BF16;
    const size_t needed = x.element_count() / std::max<int64_t>(1, dims[3]);
    if ((!is_bfloat16 && scales.element_type() != ffi::F32) || scales.element_count() != needed) {
      return ffi::Unexpected(
          Invalid("int8 needs float32 or bfloat16 scales of each place and head"));
    }
    rows.scales = scales.untyped_data();
    rows.are_scales_bfloat16 = is_bfloat16;
  }
  return rows;
}

ffi::Error CheckTokens(const CachedAttention& a) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    const std::string token = "token " + std::to_string(t);
    if (a.rows[t] >= a.num_rows) {
      return Invalid(token + " is of row " + std::to_string(a.rows[t]) + ", and there are " +
                     std::to_string(a.num_rows));
    }
    if (a.tables != nullptr && a.rows[t] >= 0 && a.positions[t] >= a.slots) {
      return Invalid(token + " is at position " + std::to_string(a.positions[t]) +
                     ", and the pages of a row hold " + std::to_string(a.slots));
    }
  }
  return ffi::Error::Success();
}

// Cuts the heads of tokens that follow each other in one row.
void CutHeads(const CachedAttention& a, int64_t token, int64_t num_tokens,
              std::vector<TokenTile>* tiles) {
  const int64_t per_group = a.heads_per_group();
  if (per_group > kGroupQueries) {
    const int64_t blocks = (per_group + kGroupQueries - 1) / kGroupQueries;
    for (int64_t group = 0; group < a.kv_heads; ++group) {
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t begin = i * per_group / blocks, end = (i + 1) * per_group / blocks;
        tiles->push_back({token, num_tokens, group * per_group + begin, end - begin});
      }
    }
    return;
  }
  const int64_t groups = std::max<int64_t>(1, kTileQueries / (num_tokens * per_group));
  for (int64_t group = 0; group < a.kv_heads; group += groups) {
    const int64_t count = std::min(groups, a.kv_heads - group);
    tiles->push_back({token, num_tokens, group * per_group, count * per_group});
  }
}

std::vector<TokenTile> CutIntoTiles(const CachedAttention& a) {
  std::vector<TokenTile> tiles;
  const int64_t most = std::max<int64_t>(1, kGroupQueries / a.heads_per_group());
  for (int64_t begin = 0, end; begin < a.tokens; begin = end) {
    end = begin + 1;
    if (a.rows[begin] < 0 || a.positions[begin] < 0) continue;
    while (end < a.tokens && a.rows[end] == a.rows[begin] && a.positions[end] >= 0) ++end;
    const int64_t blocks = (end - begin + most - 1) / most;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = begin + i * (end - begin) / blocks;
      CutHeads(a, first, begin + (i + 1) * (end - begin) / blocks - first, &tiles);
    }
  }
  return tiles;
}

std::vector<ChunkSummary> Summarize(const CachedAttention& a, const CachedAttentionKernels& kernels,
                                    const std::vector<TokenTile>& tiles) {
  std::vector<ChunkSummary> summaries(a.tables == nullptr ? a.num_rows * a.NumChunks() : 0);
  std::vector<bool> is_done(a.num_rows);
  for (const TokenTile& tile : tiles) {
    const int64_t row = a.rows[tile.token];
    if (summaries.empty() || is_done[row]) continue;
    kernels.summarize(a.slot_positions + row * a.slots, a.slots, &summaries[row * a.NumChunks()]);
    is_done[row] = true;
  }
  return summaries;
}

// Cuts each tile's parts, of which it sees some, into tasks of neighbours.
std::vector<Task> CutIntoTasks(const CachedAttention& a, const CachedAttentionKernels& kernels,
                               const std::vector<TokenTile>& tiles, int64_t threads) {
  std::vector<Task> parts;
  for (size_t tile = 0; tile < tiles.size(); ++tile) {
    for (int64_t part = 0; part < a.NumParts(); ++part) {
      if (kernels.may_see(a, tiles[tile], part)) {
        parts.push_back({static_cast<int64_t>(tile), part, 1, 0});
      }
    }
  }
  const int64_t most = parts.size() / (kTasksPerThread * threads);
  std::vector<Task> tasks;
  for (const Task& part : parts) {
    const int64_t size = kernels.partial(a, tiles[part.tile].NumQueries());
    Task* last = tasks.empty() ? nullptr : &tasks.back();
    if (last != nullptr && last->tile == part.tile && last->part + last->count == part.part &&
        last->count < most && (last->count + 1) * size * kTasksPerThread <= kWaitingFloats) {
      ++last->count;
    } else {
      tasks.push_back(part);
    }
  }
  return tasks;
}

// Works on the tasks in waves, as many as have room for their results; the parts of a tile are
// added in their order.
void Attend(ffi::ThreadPool& pool, const CachedAttention& a, const CachedAttentionKernels& kernels,
            const std::vector<TokenTile>& tiles) {
  thread_local Scratch waiting;  // tasks take ThreadScratch, also on this thread
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  std::vector<Task> tasks = CutIntoTasks(a, kernels, tiles, threads);
  int64_t most = 1;
  for (const TokenTile& tile : tiles) most = std::max(most, tile.NumQueries());
  const int64_t floats = kernels.scratch(a, most);
  const int64_t room = std::max(kWaitingFloats * threads, kernels.partial(a, most));
  for (size_t begin = 0, end; begin < tasks.size(); begin = end) {
    std::vector<Task> merges;  // of neighbouring tasks of one tile
    int64_t used = 0;
    for (end = begin; end < tasks.size(); ++end) {
      Task& task = tasks[end];
      const int64_t size = task.count * kernels.partial(a, tiles[task.tile].NumQueries());
      if (used + size > room) break;
      task.at = used;
      used += size;
      if (end == begin || merges.back().tile != task.tile) {
        merges.push_back(task);
      } else {
        merges.back().count += task.count;
      }
    }
    float* const partials = waiting.Take(used);
    ParallelFor(pool, end - begin, [&](int64_t i) {
      const Task& task = tasks[begin + i];
      kernels.attend(a, tiles[task.tile], task.part, task.count, partials + task.at,
                     ThreadScratch(floats));
    });
    ParallelFor(pool, merges.size(), [&](int64_t i) {
      kernels.merge(a, tiles[merges[i].tile], merges[i].count, partials + merges[i].at);
    });
  }
}

void Run(ffi::ThreadPool& pool, CachedAttention& a) {
  const CachedAttentionKernels& kernels = *CurrentIsa().cached_attention;
  const std::vector<TokenTile> tiles = CutIntoTiles(a);
  const std::vector<ChunkSummary> summaries = Summarize(a, kernels, tiles);
  a.summaries = summaries.data();
  const int64_t queries = a.tokens * a.heads;
  thread_local Scratch softmax;
  a.highest = softmax.Take(2 * queries), a.totals = a.highest + queries;
  std::fill_n(a.out, queries * a.values.width, 0.0f);
  for (int64_t i = 0; i < queries; ++i) {
    const float sink = a.sink_logits == nullptr ? kNothingSeen : a.sink_logits[i % a.heads];
    const bool is_none = sink <= kNothingSeen;
    a.highest[i] = is_none ? kNothingSeen : sink;
    a.totals[i] = is_none ? 0.0f : 1.0f;  // the sink's own exponential
  }
  Attend(pool, a, kernels, tiles);
  ParallelFor(pool, (a.tokens + kFinishTokens - 1) / kFinishTokens, [&](int64_t i) {
    kernels.finish(a, i * kFinishTokens, std::min(a.tokens, (i + 1) * kFinishTokens));
  });
}

ffi::Error CachedAttentionCall(ffi::ThreadPool pool, F32 q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                               ffi::AnyBuffer k_scales, ffi::AnyBuffer v_scales, S32 rows,
                               S32 positions, S32 places, F32 sink_logits,
                               ffi::ResultBuffer<ffi::F32> out, bool is_paged, int64_t window,
                               int64_t num_sinks, int64_t value_width, float scale) {
  CachedAttention a = {};
  auto keys = Rows(k, k_scales, 0);
  if (!keys.has_value()) return keys.error();
  a.are_values_keys = value_width > 0;
  auto values = a.are_values_keys ? Rows(k, k_scales, value_width) : Rows(v, v_scales, 0);
  if (!values.has_value()) return values.error();
  a.keys = *keys, a.values = *values;
  const auto qs = q.dimensions(), ks = k.dimensions(), at = places.dimensions();
  const bool has_values =
      a.are_values_keys ? value_width <= ks[3] : v.dimensions().first(3) == ks.first(3);
  if (qs.size() != 3 || at.size() != 2 || ks[3] != qs[2] || ks[2] == 0 || qs[1] % ks[2] ||
      !has_values || rows.element_count() != static_cast<size_t>(qs[0]) ||
      positions.element_count() != rows.element_count() ||
      (!is_paged && (at[0] != ks[0] || at[1] != ks[1])) || (is_paged && ks[1] == 0)) {
    return Invalid("queries, keys, values and places don't fit each other");
  }
  a.tokens = qs[0], a.heads = qs[1], a.kv_heads = ks[2];
  a.num_rows = at[0], a.slots = is_paged ? at[1] * ks[1] : at[1];
  a.page_size = is_paged ? ks[1] : 0, a.num_pages = is_paged ? ks[0] : 0;
  a.window = window, a.num_sinks = window > 0 ? num_sinks : 0, a.scale = scale;
  a.q = q.typed_data(), a.rows = rows.typed_data(), a.positions = positions.typed_data();
  (is_paged ? a.tables : a.slot_positions) = places.typed_data();
  if (sink_logits.element_count() == static_cast<size_t>(a.heads)) {
    a.sink_logits = sink_logits.typed_data();
  }
  a.out = out->typed_data();
  int32_t wrong_page = 0;
  a.wrong_page = &wrong_page;
  if (ffi::Error error = CheckTokens(a); error.failure()) return error;
  if (a.tokens > 0) Run(pool, a);
  if (wrong_page) return Invalid("a page that a token sees is not in [0, " +
                                 std::to_string(a.num_pages) + "): check the tables");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_cached_attention, moesaic::CachedAttentionCall,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("is_paged")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("num_sinks")
                                  .Attr<int64_t>("value_width")
                                  .Attr<float>("scale"));

#pragma GCC visibility pop
