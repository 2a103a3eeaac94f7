// Attention over cached slots for one instruction set; included by isa_*.cc after
// cached_products.inl.
//
// A chunk's keys are transposed once for all queries of a tile that share them; values are read
// where they lie, or are copied once.

namespace moesaic {
namespace MOESAIC_ISA {

static int64_t PaddedWidth(const CachedAttention& a) { return RoundUp(a.values.width, kLanes); }

// The queries of one group: `first` of the tile's, ordered by token and head.
struct Group {
  int64_t group, first, heads;
};

// Query `i` of a group in an array [T, H, ...].
MOESAIC_INLINE int64_t QueryAt(const CachedAttention& a, const TokenTile& tile, const Group& g,
                               int64_t i) {
  const int64_t head = Max(tile.head, g.group * a.heads_per_group()) + i % g.heads;
  return (tile.token + i / g.heads) * a.heads + head;
}

static Group GroupOf(const CachedAttention& a, const TokenTile& tile, int64_t index) {
  const int64_t per_group = a.heads_per_group(), heads = Min(per_group, tile.num_heads);
  return {tile.head / per_group + index, index * heads * tile.num_tokens, heads};
}

static int64_t NumGroups(const CachedAttention& a, const TokenTile& tile) {
  return (tile.num_heads + a.heads_per_group() - 1) / a.heads_per_group();
}

// What `attend` works with.
struct TileScratch {
  float *queries, *sums, *keys, *value_rows, *scores, *zeros;

  TileScratch(const CachedAttention& a, int64_t num_queries, Allocator& memory) {
    const int64_t width = PaddedWidth(a);
    queries = memory.Take(num_queries * a.keys.width);
    sums = memory.Take(num_queries * kLanes);
    keys = memory.Take(kChunkSlots * a.keys.width);
    value_rows = memory.Take(kChunkSlots * width);
    scores = memory.Take(kTileRows * kChunkSlots);
    zeros = memory.Take(Max(a.keys.width, width));
  }
};

// A partial result: the sums of exp(score - highest), [queries], and of its products with values,
// [queries, PaddedWidth()].
struct Partial {
  float *highest, *totals, *out;

  Partial(const CachedAttention& a, int64_t queries, Allocator& memory) {
    highest = memory.Take(queries);
    totals = memory.Take(queries);
    out = memory.Take(queries * PaddedWidth(a));
  }
};

// The tile's queries in panels of up to kTileRows of a group, [width, queries of the panel].
static void PackQueries(const CachedAttention& a, const TokenTile& tile, float* packed) {
  const int64_t width = a.keys.width, whole = width / 4 * 4;
  for (int64_t index = 0; index < NumGroups(a, tile); ++index) {
    const Group g = GroupOf(a, tile, index);
    const int64_t queries = tile.num_tokens * g.heads;
    for (int64_t begin = 0; begin < queries; begin += kTileRows) {
      const int64_t count = Min(kTileRows, queries - begin);
      const float* from[kTileRows];
      for (int64_t i = 0; i < count; ++i) from[i] = a.q + QueryAt(a, tile, g, begin + i) * width;
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {
        for (int64_t c = 0; c < whole; c += 4) {
          Transpose4(from[i] + c, from[i + 1] + c, from[i + 2] + c, from[i + 3] + c,
                     packed + c * count + i, count);
        }
        for (int64_t c = whole; c < width; ++c) {
          for (int64_t j = i; j < i + 4; ++j) packed[c * count + j] = from[j][c];
        }
      }
      for (; i < count; ++i) {
        for (int64_t c = 0; c < width; ++c) packed[c * count + i] = from[i][c];
      }
      packed += count * width;
    }
  }
}

static bool IsFinite(const float* row, int64_t width) {
  uint32_t largest = 0;
  for (int64_t c = 0; c < width; ++c) {
    uint32_t bits;
    __builtin_memcpy(&bits, row + c, sizeof(bits));
    bits &= 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  return largest < 0x7F800000;
}

// Whether a value that one token sees would reach another that does not: 0 * NaN is NaN.
static bool MustPart(const CachedAttention& a, const TokenTile& tile, const Chunk& chunk,
                     const float* const* values) {
  if (tile.num_tokens == 1 || chunk.is_all_seen) return false;
  for (int64_t i = 0; i < chunk.end; ++i) {
    if (chunk.places[i] >= 0 && !IsFinite(values[i], a.values.width)) return true;
  }
  return false;
}

// Adds the values of queries [begin, begin + count) of a group, one token after the other.
static void AddValuesByToken(const CachedAttention& a, const TokenTile& tile, const Group& g,
                             const Chunk& chunk, int64_t begin, int64_t count,
                             const float* const* values, const TileScratch& s, const float* shrink,
                             float* out) {
  const int64_t stride = PaddedWidth(a);
  for (int64_t i = 0; i < count;) {
    const int64_t token = (begin + i) / g.heads;
    const int64_t end = Min(count, (token + 1) * g.heads - begin);
    const Sight sight(a, tile.token + token);
    const float* seen_values[kChunkSlots];
    for (int64_t v = 0; v < kChunkVectors; ++v) {
      int32_t seen[kLanes];
      const IntVector sees = sight.Sees(LoadInts(chunk.positions + v * kLanes));
      __builtin_memcpy(seen, &sees, sizeof(seen));
      for (int64_t j = 0; j < kLanes; ++j) {
        seen_values[v * kLanes + j] = seen[j] ? values[v * kLanes + j] : s.zeros;
      }
    }
    AddValues<kTileRows>(end - i, s.scores + i * kChunkSlots, {seen_values, nullptr, chunk.end},
                         shrink + i, out + i * stride, stride);
    i = end;
  }
}

// Takes the scores of slots that a query must not see to -inf.
static void HideSlots(const CachedAttention& a, const TokenTile& tile, const Group& g,
                      const Chunk& chunk, int64_t begin, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; ++i, scores += kChunkSlots) {
    const Sight sight(a, tile.token + (begin + i) / g.heads);
    for (int64_t v = 0; v < kChunkVectors; ++v) {
      const IntVector seen = sight.Sees(LoadInts(chunk.positions + v * kLanes));
      const Vector score = Load(scores + v * kLanes);
      Store(scores + v * kLanes, seen ? score : Broadcast(kHidden));
    }
  }
}

// A chunk's keys as [width][kChunkSlots], without their scales.
static void TakeKeys(const StoredRows& keys, const char* const* found, Ahead* ahead, float* to) {
  switch (keys.type) {
    case Stored::kFloat32: return TransposeKeys<float>(found, keys.width, ahead, to);
    case Stored::kBFloat16: return TransposeKeys<uint16_t>(found, keys.width, ahead, to);
    case Stored::kInt8: return TransposeKeys<int8_t>(found, keys.width, ahead, to);
  }
}

// Multiplies the scores of int8 keys by the keys' scales.
static void ScaleScores(const CachedAttention& a, const Chunk& chunk, int64_t group,
                        int64_t queries, float* scores) {
  float scales[kChunkSlots];
  for (int64_t i = 0; i < kChunkSlots; ++i) {
    const int64_t place = chunk.places[i];
    scales[i] = place < 0 ? 0.0f : ScaleAt(a.keys, place * a.kv_heads + group);
  }
  for (int64_t i = 0; i < queries * kChunkSlots; i += kLanes) {
    Store(scores + i, Load(scores + i) * Load(scales + i % kChunkSlots));
  }
}

// Takes a chunk into the sums of one group's queries, and sends for what lies ahead.
static void AttendGroup(const CachedAttention& a, const TokenTile& tile, const Group& g,
                        const Chunk& chunk, Ahead* keys_ahead, Ahead* values_ahead,
                        const TileScratch& s, const Partial& to) {
  const int64_t width = a.keys.width, stride = PaddedWidth(a);
  const int64_t queries = tile.num_tokens * g.heads;
  const char *found[kChunkSlots];
  FindRows(a.keys, a.kv_heads, g.group, chunk, s.zeros, found);
  TakeKeys(a.keys, found, keys_ahead, s.keys);
  if (!a.are_values_keys) FindRows(a.values, a.kv_heads, g.group, chunk, s.zeros, found);
  // Values are copied where they are no floats, or would be read many times or past their width.
  const bool is_float = a.values.type == Stored::kFloat32 && a.values.width == stride;
  const float* copies[kChunkSlots];
  ValueRows values = {reinterpret_cast<const float* const*>(found), values_ahead, chunk.end};
  if (!is_float || queries > 2 * kTileRows) {
    CopyRows(a.values, a.kv_heads, g.group, chunk, found, values_ahead, stride, s.zeros,
             s.value_rows, copies);
    values = {copies, nullptr, chunk.end};
  }
  const bool must_part = MustPart(a, tile, chunk, values.rows);
  for (int64_t begin = 0; begin < queries; begin += kTileRows) {
    const int64_t count = Min(kTileRows, queries - begin), first = g.first + begin;
    Score<kTileRows>(count, width, a.scale, s.queries + first * width, s.keys, s.scores);
    if (a.keys.scales != nullptr) ScaleScores(a, chunk, g.group, count, s.scores);
    if (!chunk.is_all_seen) HideSlots(a, tile, g, chunk, begin, count, s.scores);
    float shrink[kTileRows];
    Weigh(count, s.scores, to.highest + first, s.sums + first * kLanes, shrink);
    float* out = to.out + first * stride;
    if (must_part) {
      AddValuesByToken(a, tile, g, chunk, begin, count, values.rows, s, shrink, out);
    } else {
      AddValues<kTileRows>(count, s.scores, values, shrink, out, stride);
    }
    values.ahead = nullptr;
  }
}

// The chunks from `index` to `end` that a tile sees. Two live at a time: the one that is worked on
// and the next.
struct Walk {
  int64_t index, end;
  Chunk chunks[2];
  int in_use;
};

// The next chunk; null after the last.
static const Chunk* NextChunk(const CachedAttention& a, const TokenTile& tile, Walk* walk) {
  walk->in_use ^= 1;
  Chunk* chunk = &walk->chunks[walk->in_use];
  for (; walk->index < walk->end; ++walk->index) {
    const ChunkSummary summary = SummaryOf(a, tile.token, walk->index);
    if (!TileMaySee(a, tile, summary)) continue;
    FindChunk(a, tile, walk->index, summary, chunk);
    if (chunk->end == 0) continue;
    ++walk->index;
    return chunk;
  }
  return nullptr;
}

static void AttendParts(const CachedAttention& a, const TokenTile& tile, int64_t begin,
                        int64_t count, float* partials, float* scratch) {
  const int64_t queries = tile.NumQueries(), per_part = kPartSlots / kChunkSlots;
  Allocator memory = {scratch, 0}, partial_memory = {partials, 0};
  const TileScratch s(a, queries, memory);
  PackQueries(a, tile, s.queries);
  Zero(s.zeros, Max(a.keys.width, PaddedWidth(a)));
  Walk walk;
  walk.index = begin * per_part, walk.end = Min(a.NumChunks(), (begin + count) * per_part);
  walk.in_use = 0;
  const Chunk* chunk = NextChunk(a, tile, &walk);
  for (int64_t part = begin; part < begin + count; ++part) {
    const Partial to(a, queries, partial_memory);
    Zero(s.sums, queries * kLanes);
    Zero(to.out, queries * PaddedWidth(a));
    for (int64_t i = 0; i < queries; ++i) to.highest[i] = kNothingSeen;
    while (chunk != nullptr && chunk->index / per_part == part) {
      const Chunk* next = NextChunk(a, tile, &walk);
      const int64_t groups = NumGroups(a, tile), first = GroupOf(a, tile, 0).group;
      Ahead keys_ahead(a.keys, a.kv_heads, first, groups, next);
      Ahead values_ahead(a.values, a.kv_heads, first, groups, a.are_values_keys ? nullptr : next);
      for (int64_t group = 0; group < groups; ++group) {
        AttendGroup(a, tile, GroupOf(a, tile, group), *chunk, &keys_ahead, &values_ahead, s, to);
      }
      chunk = next;
    }
    for (int64_t i = 0; i < queries; ++i) to.totals[i] = SumOf(s.sums + i * kLanes);
  }
}

static void Merge(const CachedAttention& a, const TokenTile& tile, int64_t count,
                  const float* partials) {
  const int64_t width = a.values.width, stride = PaddedWidth(a);
  Allocator memory = {const_cast<float*>(partials), 0};
  for (int64_t n = 0; n < count; ++n) {
    const Partial from(a, tile.NumQueries(), memory);
    for (int64_t index = 0; index < NumGroups(a, tile); ++index) {
      const Group g = GroupOf(a, tile, index);
      for (int64_t i = 0; i < tile.num_tokens * g.heads; ++i) {
        const int64_t query = g.first + i, at = QueryAt(a, tile, g, i);
        const float old = a.highest[at], found = from.highest[query];
        const float top = found > old ? found : old;
        const Vector shrink = Exp(Broadcast(old - top)), share = Exp(Broadcast(found - top));
        a.highest[at] = top;
        a.totals[at] = a.totals[at] * shrink[0] + from.totals[query] * share[0];
        float* out = a.out + at * width;
        const float* added = from.out + query * stride;
        int64_t w = 0;
        for (; w + kLanes <= width; w += kLanes) {
          Store(out + w, Load(out + w) * shrink + Load(added + w) * share);
        }
        for (; w < width; ++w) out[w] = out[w] * shrink[0] + added[w] * share[0];
      }
    }
  }
}

static void Finish(const CachedAttention& a, int64_t begin, int64_t end) {
  const int64_t width = a.values.width;
  for (int64_t i = begin * a.heads; i < end * a.heads; ++i) {
    // Where nothing is seen, the sums of values are zero; a total that is NaN stays.
    const float factor = a.totals[i] == 0.0f ? 0.0f : 1.0f / a.totals[i];
    for (int64_t w = 0; w < width; ++w) a.out[i * width + w] *= factor;
  }
}

static int64_t TileFloats(const CachedAttention& a, int64_t queries) {
  Allocator memory = {nullptr, 0};
  TileScratch(a, queries, memory);
  return memory.used;
}

static int64_t PartialFloats(const CachedAttention& a, int64_t queries) {
  Allocator memory = {nullptr, 0};
  Partial(a, queries, memory);
  return memory.used;
}

extern const CachedAttentionKernels kCachedAttentionKernels;
const CachedAttentionKernels kCachedAttentionKernels = {
    TileFloats, PartialFloats, Summarize, MaySeePart, AttendParts, Merge, Finish};

}  // namespace MOESAIC_ISA
}  // namespace moesaic
