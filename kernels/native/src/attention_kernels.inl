// Attention for one instruction set; included by isa_*.cc after quantized_kernels.inl.
//
// Queries lie in the lanes of vectors, keys follow each other in memory: a panel's scores are
// [keys, queries]. So the softmax needs no sum across lanes, and weights come out in the order in
// which the product with the values wants them. Softmax runs online, over chunks of keys
// (Milakov and Gimelshein, 2018; Dao et al., 2022).

namespace moesaic {
namespace MOESAIC_ISA {

constexpr int64_t kQueries = kTileCols;
constexpr int64_t kQueryVectors = kTileVectors;
constexpr int64_t kChunkKeys = 96;
constexpr float kHidden = -__builtin_inff();
static_assert(kKeyAlignment % kTileRows == 0 && kChunkKeys % kKeyAlignment == 0,
              "chunks of keys are whole tiles");

MOESAIC_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
MOESAIC_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
MOESAIC_INLINE int64_t RoundUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Panel `panel` of a group: its queries' rows and heads.
struct Panel {
  int64_t first, count;      // queries: row * heads_per_group + head
  int64_t first_row, end_row;
  IntVector positions[kQueryVectors];  // -1 in lanes beyond the last query
  IntVector segments[kQueryVectors];
};

// A query's offset in an array [B, L, H, ...] counted in its last dimension.
MOESAIC_INLINE int64_t QueryAt(const Attention& a, int64_t row, int64_t group, int64_t query) {
  const int64_t heads = a.heads_per_group();
  return (row * a.length + query / heads) * a.heads + group * heads + query % heads;
}

static Panel MakePanel(const Attention& a, int64_t row, int64_t panel) {
  const int64_t heads = a.heads_per_group(), padded = PaddedLength(a.length);
  Panel p;
  p.first = panel * kQueries;
  p.count = Min(kQueries, a.length * heads - p.first);
  p.first_row = p.first / heads;
  p.end_row = (p.first + p.count - 1) / heads + 1;
  int32_t positions[kQueries], segments[kQueries];
  for (int64_t i = 0; i < kQueries; ++i) {
    const int64_t at = row * padded + (p.first + Min(i, p.count - 1)) / heads;
    positions[i] = i < p.count ? a.positions[at] : -1;
    segments[i] = a.segments[at];
  }
  __builtin_memcpy(p.positions, positions, sizeof(positions));
  __builtin_memcpy(p.segments, segments, sizeof(segments));
  return p;
}

// Keys [begin, end), whole tiles.
struct Range {
  int64_t begin, end;
};

// The keys that some query of the panel may see: at most two ranges, sinks and what is near.
static int KeyRanges(const Attention& a, int64_t row, const Panel& p, Range ranges[2]) {
  const int64_t first = a.starts[row * PaddedLength(a.length) + p.first_row];
  const int64_t end = RoundUp(p.end_row, kKeyAlignment);
  int64_t near = first;
  if (a.window > 0 && !a.gaps) near = Max(first, p.first_row - a.window + 1);
  near = near / kKeyAlignment * kKeyAlignment;
  const int64_t first_sink = first / kKeyAlignment * kKeyAlignment;
  const int64_t sinks_end = RoundUp(first + a.num_sinks, kKeyAlignment);
  if (a.num_sinks == 0 || near <= sinks_end) {
    ranges[0] = {a.num_sinks == 0 ? near : Min(first_sink, near), end};
    return 1;
  }
  ranges[0] = {first_sink, sinks_end};
  ranges[1] = {near, end};
  return 2;
}

// Whether every query of the panel sees every key of the range.
static bool AllVisible(const Attention& a, int64_t row, const Panel& p, Range keys) {
  const int64_t base = row * PaddedLength(a.length);
  const int32_t* positions = a.positions + base;
  if (p.count < kQueries || keys.end > p.first_row + 1) return false;
  if (a.starts[base + p.end_row - 1] > keys.begin) return false;
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    if (positions[key] < 0) return false;
  }
  for (int64_t i = p.first_row; i < p.end_row; ++i) {
    if (positions[i] < 0) return false;
  }
  return a.window == 0 || positions[p.end_row - 1] - positions[keys.begin] < a.window;
}

// Takes the scores of keys that a query must not see to -inf.
static void Hide(const Attention& a, int64_t row, const Panel& p, Range keys, float* scores) {
  const int64_t base = row * PaddedLength(a.length);
  const int32_t window = a.window > 0 ? static_cast<int32_t>(a.window) : 0x7FFFFFFF;
  for (int64_t key = keys.begin; key < keys.end; ++key, scores += kQueries) {
    const int32_t position = a.positions[base + key], segment = a.segments[base + key];
    const bool is_sink = position < a.num_sinks;
#pragma GCC unroll 4
    for (int64_t j = 0; j < kQueryVectors; ++j) {
      IntVector seen = (p.positions[j] >= position) & (p.segments[j] == segment);
      if (!is_sink) seen &= p.positions[j] - position < window;
      if (position < 0) seen = IntVector{};
      const Vector score = Load(scores + j * kLanes);
      Store(scores + j * kLanes, seen ? score : Broadcast(kHidden));
    }
  }
}

// Rows of an array [B, L, H, width] as lanes: packed[width, kQueries], zeros in lanes without one.
static void PackQueries(const Attention& a, int64_t row, int64_t group, const Panel& p,
                        const float* from, int64_t width, float scale, float* packed) {
  for (int64_t i = 0; i < kQueries; ++i) {
    if (i >= p.count) {
      for (int64_t c = 0; c < width; ++c) packed[c * kQueries + i] = 0.0f;
      continue;
    }
    const float* source = from + QueryAt(a, row, group, p.first + i) * width;
    for (int64_t c = 0; c < width; ++c) packed[c * kQueries + i] = source[c] * scale;
  }
}

// The inverse for an array that is written; lanes are scaled by `factors`.
static void UnpackQueries(const Attention& a, int64_t row, int64_t group, const Panel& p,
                          const float* packed, const float* factors, int64_t width, float* to) {
  for (int64_t i = 0; i < p.count; ++i) {
    float* target = to + QueryAt(a, row, group, p.first + i) * width;
    for (int64_t c = 0; c < width; ++c) target[c] = packed[c * kQueries + i] * factors[i];
  }
}

// Rows of an array [B, L, H, width] as the right side of a product over queries:
// [RoundUp(width) / kTileCols][kQueries][kTileCols], zeros in lanes without one.
static void PackRowsOfQueries(const Attention& a, int64_t row, int64_t group, const Panel& p,
                              const float* from, int64_t width, float scale, float* packed) {
  for (int64_t c = 0; c < width; c += kTileCols, packed += kQueries * kTileCols) {
    const int64_t cols = Min(kTileCols, width - c);
    for (int64_t i = 0; i < kQueries; ++i) {
      float* target = packed + i * kTileCols;
      const float* source = from + QueryAt(a, row, group, p.first + Min(i, p.count - 1)) * width + c;
      const float factor = i < p.count ? scale : 0.0f;
      for (int64_t j = 0; j < cols; ++j) target[j] = source[j] * factor;
      for (int64_t j = cols; j < kTileCols; ++j) target[j] = 0.0f;
    }
  }
}

// One value of an array [B, L, H] for each lane; `beyond` in lanes without a query.
static void LoadQueries(const Attention& a, int64_t row, int64_t group, const Panel& p,
                        const float* from, float beyond, float* lanes) {
  for (int64_t i = 0; i < kQueries; ++i) {
    lanes[i] = i < p.count ? from[QueryAt(a, row, group, p.first + i)] : beyond;
  }
}

// A group's keys or values [B, L, G, width] as rows of tiles: [keys / kTileRows][width][kTileRows].
static void PackKeys(const Attention& a, int64_t row, int64_t group, const float* from,
                     int64_t width, float* packed) {
  const int64_t stride = a.kv_heads * width;
  const float* base = from + row * a.length * stride + group * width;
  for (int64_t key = 0; key < PaddedLength(a.length); key += kTileRows) {
    const int64_t rows = Max(0, Min(kTileRows, a.length - key));
    Pack<kTileRows>(base + key * stride, 1, stride, width, rows, packed + key * width);
  }
}

// The same with keys as depth: [RoundUp(width) / kTileRows][keys][kTileRows].
static void PackKeysAsDepth(const Attention& a, int64_t row, int64_t group, const float* from,
                            int64_t width, float* packed) {
  const int64_t stride = a.kv_heads * width, padded = PaddedLength(a.length);
  const float* base = from + row * a.length * stride + group * width;
  for (int64_t c = 0; c < width; c += kTileRows, packed += padded * kTileRows) {
    Pack<kTileRows>(base + c, stride, 1, a.length, Min(kTileRows, width - c), packed);
    for (int64_t i = a.length * kTileRows; i < padded * kTileRows; ++i) packed[i] = 0.0f;
  }
}

static void Zero(float* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(float)); }

// Takes parts of the scratch, each aligned to 64 bytes.
struct Allocator {
  float* next;
  int64_t used;

  float* Take(int64_t floats) {
    const int64_t rounded = RoundUp(floats, 16);
    float* taken = next == nullptr ? nullptr : next + used;
    used += rounded;
    return taken;
  }
};

struct ForwardScratch {
  float *keys, *values, *queries, *scores, *out;

  ForwardScratch(const Attention& a, Allocator& memory) {
    const int64_t padded = PaddedLength(a.length), width = RoundUp(a.value_width, kTileRows);
    keys = memory.Take(padded * a.width);
    values = memory.Take(padded * width);
    queries = memory.Take(a.width * kQueries);
    scores = memory.Take(kChunkKeys * kQueries);
    out = memory.Take(width * kQueries);
  }
};

// scores[keys, queries] of a range, -inf where a query must not see.
static void Scores(const Attention& a, int64_t row, const Panel& p, Range range, const float* keys,
                   const float* queries, float* scores) {
  for (int64_t key = range.begin; key < range.end; key += kTileRows) {
    Tile(a.width, keys + key * a.width, queries, scores + (key - range.begin) * kQueries, kQueries,
         false);
  }
  if (!AllVisible(a, row, p, range)) Hide(a, row, p, range, scores);
}

static void ForwardPanel(const Attention& a, int64_t row, int64_t group, const Panel& p,
                         const ForwardScratch& s) {
  const int64_t padded = PaddedLength(a.length), width = RoundUp(a.value_width, kTileRows);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.width));
  PackQueries(a, row, group, p, a.q, a.width, scale, s.queries);
  Zero(s.out, width * kQueries);
  float lanes[kQueries];
  for (int64_t i = 0; i < kQueries; ++i) {
    const int64_t head = group * a.heads_per_group() + (p.first + i) % a.heads_per_group();
    lanes[i] = a.sink_logits == nullptr ? -1e30f : a.sink_logits[head];
  }
  Vector highest[kQueryVectors], sums[kQueryVectors];
  for (int64_t j = 0; j < kQueryVectors; ++j) {
    highest[j] = Load(lanes + j * kLanes);
    sums[j] = Broadcast(a.sink_logits == nullptr ? 0.0f : 1.0f);  // the sink's own exponential
  }
  Range ranges[2];
  const int num_ranges = KeyRanges(a, row, p, ranges);
  for (int i = 0; i < num_ranges; ++i) {
    for (int64_t begin = ranges[i].begin; begin < ranges[i].end; begin += kChunkKeys) {
      const Range chunk = {begin, Min(begin + kChunkKeys, ranges[i].end)};
      const int64_t num_keys = chunk.end - chunk.begin;
      Scores(a, row, p, chunk, s.keys, s.queries, s.scores);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kQueryVectors; ++j) {
        float* scores = s.scores + j * kLanes;
        Vector top = highest[j];
        for (int64_t key = 0; key < num_keys; ++key) {
          const Vector score = Load(scores + key * kQueries);
          top = score > top ? score : top;
        }
        const Vector shrink = Exp(highest[j] - top);
        highest[j] = top;
        sums[j] *= shrink;
        for (int64_t key = 0; key < num_keys; ++key) {
          const Vector weight = Exp(Load(scores + key * kQueries) - top);
          Store(scores + key * kQueries, weight);
          sums[j] += weight;
        }
        for (int64_t w = 0; w < width; ++w) {
          float* out = s.out + w * kQueries + j * kLanes;
          Store(out, Load(out) * shrink);
        }
      }
      for (int64_t w = 0; w < width; w += kTileRows) {
        Tile(num_keys, s.values + w * padded + begin * kTileRows, s.scores, s.out + w * kQueries,
             kQueries, true);
      }
    }
  }
  float factors[kQueries], tops[kQueries], totals[kQueries];
  __builtin_memcpy(tops, highest, sizeof(tops));
  __builtin_memcpy(totals, sums, sizeof(totals));
  for (int64_t i = 0; i < p.count; ++i) {
    factors[i] = totals[i] > 0.0f ? 1.0f / totals[i] : 0.0f;
    a.log_sums[QueryAt(a, row, group, p.first + i)] =
        totals[i] > 0.0f ? tops[i] + __builtin_logf(totals[i]) : kNothing;
  }
  UnpackQueries(a, row, group, p, s.out, factors, a.value_width, a.out);
}

static void Forward(const Attention& a, int64_t row, int64_t group, int64_t begin, int64_t end,
                    float* scratch) {
  Allocator memory = {scratch, 0};
  const ForwardScratch s(a, memory);
  PackKeys(a, row, group, a.k, a.width, s.keys);
  PackKeysAsDepth(a, row, group, a.v, a.value_width, s.values);
  for (int64_t panel = begin; panel < end; ++panel) {
    ForwardPanel(a, row, group, MakePanel(a, row, panel), s);
  }
}

struct BackwardScratch {
  float *keys, *keys_as_depth, *values, *queries, *query_rows, *d_out, *d_out_rows;
  float *weights, *d_weights, *tile, *dq, *dk, *dv;

  BackwardScratch(const Attention& a, Allocator& memory) {
    const int64_t padded = PaddedLength(a.length);
    const int64_t key_cols = RoundUp(a.width, kTileCols);
    const int64_t value_cols = RoundUp(a.value_width, kTileCols);
    const int64_t key_rows = RoundUp(a.width, kTileRows);
    keys = memory.Take(padded * a.width);
    keys_as_depth = memory.Take(padded * key_rows);
    values = memory.Take(padded * a.value_width);
    queries = memory.Take(a.width * kQueries);
    query_rows = memory.Take(key_cols * kQueries);
    d_out = memory.Take(a.value_width * kQueries);
    d_out_rows = memory.Take(value_cols * kQueries);
    weights = memory.Take(kChunkKeys * kQueries);
    d_weights = memory.Take(kChunkKeys * kQueries);
    tile = memory.Take(kTileRows * kQueries);
    dq = memory.Take(key_rows * kQueries);
    dk = memory.Take(padded * key_cols);
    dv = memory.Take(padded * value_cols);
  }
};

// to[keys, cols] += weights[keys, queries] * rows[queries, cols], for whole tiles of keys.
static void AddOverQueries(const float* weights, int64_t num_keys, const float* rows, int64_t cols,
                           float* tile, float* to) {
  for (int64_t key = 0; key < num_keys; key += kTileRows) {
    Pack<kTileRows>(weights + key * kQueries, 1, kQueries, kQueries, kTileRows, tile);
    for (int64_t c = 0; c < cols; c += kTileCols) {
      Tile(kQueries, tile, rows + c * kQueries, to + key * cols + c, cols, true);
    }
  }
}

static void BackwardPanel(const Attention& a, int64_t row, int64_t group, const Panel& p,
                          const BackwardScratch& s) {
  const int64_t padded = PaddedLength(a.length), key_rows = RoundUp(a.width, kTileRows);
  const int64_t key_cols = RoundUp(a.width, kTileCols);
  const int64_t value_cols = RoundUp(a.value_width, kTileCols);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.width));
  PackQueries(a, row, group, p, a.q, a.width, scale, s.queries);
  PackQueries(a, row, group, p, a.d_out, a.value_width, 1.0f, s.d_out);
  PackRowsOfQueries(a, row, group, p, a.q, a.width, scale, s.query_rows);
  PackRowsOfQueries(a, row, group, p, a.d_out, a.value_width, 1.0f, s.d_out_rows);
  float log_sums[kQueries], delta[kQueries];
  LoadQueries(a, row, group, p, a.log_sums, kNothing, log_sums);
  LoadQueries(a, row, group, p, a.delta, 0.0f, delta);
  Zero(s.dq, key_rows * kQueries);
  Range ranges[2];
  const int num_ranges = KeyRanges(a, row, p, ranges);
  for (int i = 0; i < num_ranges; ++i) {
    for (int64_t begin = ranges[i].begin; begin < ranges[i].end; begin += kChunkKeys) {
      const Range chunk = {begin, Min(begin + kChunkKeys, ranges[i].end)};
      const int64_t num_keys = chunk.end - chunk.begin;
      Scores(a, row, p, chunk, s.keys, s.queries, s.weights);
      for (int64_t key = 0; key < num_keys; key += kTileRows) {
        Tile(a.value_width, s.values + (begin + key) * a.value_width, s.d_out,
             s.d_weights + key * kQueries, kQueries, false);
      }
#pragma GCC unroll 4
      for (int64_t j = 0; j < kQueryVectors; ++j) {
        const Vector log_sum = Load(log_sums + j * kLanes), d = Load(delta + j * kLanes);
        for (int64_t key = 0; key < num_keys; ++key) {
          float* weight_at = s.weights + key * kQueries + j * kLanes;
          float* d_at = s.d_weights + key * kQueries + j * kLanes;
          const Vector weight = Exp(Load(weight_at) - log_sum);
          Store(weight_at, weight);
          Store(d_at, weight * (Load(d_at) - d));
        }
      }
      for (int64_t c = 0; c < key_rows; c += kTileRows) {
        Tile(num_keys, s.keys_as_depth + c * padded + begin * kTileRows, s.d_weights,
             s.dq + c * kQueries, kQueries, true);
      }
      AddOverQueries(s.d_weights, num_keys, s.query_rows, key_cols, s.tile, s.dk + begin * key_cols);
      AddOverQueries(s.weights, num_keys, s.d_out_rows, value_cols, s.tile,
                     s.dv + begin * value_cols);
    }
  }
  float factors[kQueries];
  for (int64_t i = 0; i < kQueries; ++i) factors[i] = scale;
  UnpackQueries(a, row, group, p, s.dq, factors, a.width, a.dq);
}

// Writes a group's rows of [B, L, G, width] from [keys, cols].
static void UnpackKeys(const Attention& a, int64_t row, int64_t group, const float* from,
                       int64_t cols, int64_t width, float* to) {
  for (int64_t key = 0; key < a.length; ++key) {
    float* target = to + ((row * a.length + key) * a.kv_heads + group) * width;
    __builtin_memcpy(target, from + key * cols, width * sizeof(float));
  }
}

static void Backward(const Attention& a, int64_t row, int64_t group, float* scratch) {
  Allocator memory = {scratch, 0};
  const BackwardScratch s(a, memory);
  const int64_t padded = PaddedLength(a.length);
  const int64_t key_cols = RoundUp(a.width, kTileCols);
  const int64_t value_cols = RoundUp(a.value_width, kTileCols);
  PackKeys(a, row, group, a.k, a.width, s.keys);
  PackKeys(a, row, group, a.v, a.value_width, s.values);
  PackKeysAsDepth(a, row, group, a.k, a.width, s.keys_as_depth);
  Zero(s.dk, padded * key_cols);
  Zero(s.dv, padded * value_cols);
  const int64_t num_panels = (a.length * a.heads_per_group() + kQueries - 1) / kQueries;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    BackwardPanel(a, row, group, MakePanel(a, row, panel), s);
  }
  UnpackKeys(a, row, group, s.dk, key_cols, a.width, a.dk);
  UnpackKeys(a, row, group, s.dv, value_cols, a.value_width, a.dv);
}

static int64_t ForwardFloats(const Attention& a) {
  Allocator memory = {nullptr, 0};
  ForwardScratch(a, memory);
  return memory.used;
}

static int64_t BackwardFloats(const Attention& a) {
  Allocator memory = {nullptr, 0};
  BackwardScratch(a, memory);
  return memory.used;
}

extern const AttentionKernels kAttentionKernels;
const AttentionKernels kAttentionKernels = {kQueries, ForwardFloats, BackwardFloats, Forward,
                                            Backward};

}  // namespace MOESAIC_ISA
}  // namespace moesaic
