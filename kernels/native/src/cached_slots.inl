// Cached slots for one instruction set: which of them a token sees, and keys and values as floats;
// included by isa_*.cc after attention_kernels.inl.

namespace moesaic {
namespace MOESAIC_ISA {

constexpr int64_t kChunkVectors = kChunkSlots / kLanes;

// --- Which slots are seen ------------------------------------------------------------------------

// What one token sees; a window that holds everything stands for none.
struct Sight {
  int32_t position, window, num_sinks;

  Sight(const CachedAttention& a, int64_t token)
      : position(a.positions[token]),
        window(a.window > 0 ? static_cast<int32_t>(a.window) : kNoPosition),
        num_sinks(static_cast<int32_t>(a.num_sinks)) {}

  IntVector Sees(IntVector at) const {
    return (at >= 0) & (at <= position) & ((position - at < window) | (at < num_sinks));
  }
  bool SeesAll(const ChunkSummary& c) const {
    return c.lowest >= 0 && c.highest <= position && position - c.lowest < window;
  }
  bool MaySee(const ChunkSummary& c) const {
    return c.lowest_held <= position &&
           (position - c.highest < window || c.lowest_held < num_sinks);
  }
};

static void Summarize(const int32_t* slot_positions, int64_t slots, ChunkSummary* summaries) {
  for (int64_t first = 0; first < slots; first += kChunkSlots, ++summaries) {
    const int64_t count = Min(kChunkSlots, slots - first);
    ChunkSummary s = {kNoPosition, kNoPosition, -1};
    for (int64_t i = 0; i < count; ++i) {
      const int32_t position = slot_positions[first + i];
      const int32_t held = position < 0 ? kNoPosition : position;
      s.lowest = position < s.lowest ? position : s.lowest;
      s.lowest_held = held < s.lowest_held ? held : s.lowest_held;
      s.highest = position > s.highest ? position : s.highest;
    }
    *summaries = s;
  }
}

// Of chunk `chunk` of a token's row.
static ChunkSummary SummaryOf(const CachedAttention& a, int64_t token, int64_t chunk) {
  if (a.tables == nullptr) return a.summaries[a.rows[token] * a.NumChunks() + chunk];
  const int32_t first = static_cast<int32_t>(chunk * kChunkSlots);
  const int64_t end = Min(a.slots, (chunk + 1) * kChunkSlots);
  return {first, first, static_cast<int32_t>(end - 1)};
}

static bool TileMaySee(const CachedAttention& a, const TokenTile& tile,
                       const ChunkSummary& summary) {
  for (int64_t t = tile.token; t < tile.token + tile.num_tokens; ++t) {
    if (Sight(a, t).MaySee(summary)) return true;
  }
  return false;
}

static bool MaySeePart(const CachedAttention& a, const TokenTile& tile, int64_t part) {
  const int64_t per_part = kPartSlots / kChunkSlots;
  const int64_t end = Min(a.NumChunks(), (part + 1) * per_part);
  for (int64_t chunk = part * per_part; chunk < end; ++chunk) {
    if (TileMaySee(a, tile, SummaryOf(a, tile.token, chunk))) return true;
  }
  return false;
}

// A chunk as a tile sees it.
struct Chunk {
  int64_t index;
  int32_t positions[kChunkSlots];  // -1 past the row's end
  int64_t places[kChunkSlots];     // in storage; -1: no token of the tile sees it
  int64_t end;                     // past the last slot that some token sees
  bool is_all_seen;                // by every token
};

static void FindPositions(const CachedAttention& a, int64_t row, int64_t first, Chunk* chunk) {
  const int64_t count = Min(kChunkSlots, a.slots - first);
  for (int64_t i = 0; i < count; ++i) {
    chunk->positions[i] = a.tables != nullptr ? static_cast<int32_t>(first + i)
                                              : a.slot_positions[row * a.slots + first + i];
  }
  for (int64_t i = count; i < kChunkSlots; ++i) chunk->positions[i] = -1;
}

// Where the slots that `seen` (not 0) marks lie. Tables are read for these alone.
static void FindPlaces(const CachedAttention& a, int64_t row, int64_t first, const int32_t* seen,
                       Chunk* chunk) {
  chunk->end = 0;
  int64_t page = -1, page_start = 0;
  for (int64_t i = 0; i < kChunkSlots; ++i) {
    chunk->places[i] = -1;
    if (seen[i] == 0) continue;
    if (a.tables == nullptr) {
      chunk->places[i] = row * a.slots + first + i;
    } else {
      if (page < 0 || first + i >= page_start + a.page_size) {
        const int64_t at = (first + i) / a.page_size;
        page = a.tables[row * (a.slots / a.page_size) + at];
        page_start = at * a.page_size;
        if (page < 0 || page >= a.num_pages) {
          __atomic_store_n(a.wrong_page, 1, __ATOMIC_RELAXED);
          page = -1;
          continue;
        }
      }
      chunk->places[i] = page * a.page_size + first + i - page_start;
    }
    chunk->end = i + 1;
  }
}

static void FindChunk(const CachedAttention& a, const TokenTile& tile, int64_t index,
                      const ChunkSummary& summary, Chunk* chunk) {
  const int64_t row = a.rows[tile.token], first = index * kChunkSlots;
  chunk->index = index;
  FindPositions(a, row, first, chunk);
  IntVector seen[kChunkVectors] = {};
  chunk->is_all_seen = first + kChunkSlots <= a.slots;
  for (int64_t t = tile.token; t < tile.token + tile.num_tokens; ++t) {
    const Sight sight(a, t);
    chunk->is_all_seen &= sight.SeesAll(summary);
    for (int64_t v = 0; v < kChunkVectors; ++v) {
      seen[v] |= sight.Sees(LoadInts(chunk->positions + v * kLanes));
    }
  }
  int32_t marks[kChunkSlots];
  __builtin_memcpy(marks, seen, sizeof(marks));
  FindPlaces(a, row, first, marks, chunk);
}

// --- Keys and values as floats -------------------------------------------------------------------

MOESAIC_INLINE float FromBFloat16(uint16_t upper) {
  const uint32_t bits = static_cast<uint32_t>(upper) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

MOESAIC_INLINE Vector LoadWide(const float* from, float) { return Load(from); }
MOESAIC_INLINE float Wide(float value, float) { return value; }

MOESAIC_INLINE Vector LoadWide(const uint16_t* from, float) {
  return LoadHalves(from);
}
MOESAIC_INLINE float Wide(uint16_t value, float) { return FromBFloat16(value); }

// The compiler's own conversion of bytes goes one by one.
MOESAIC_INLINE IntVector LoadBytes(const int8_t* from) {
#if MOESAIC_VECTOR_BYTES == 64
  return (IntVector)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif MOESAIC_VECTOR_BYTES == 32
  return (IntVector)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  return IntVector{from[0], from[1], from[2], from[3]};
#endif
}
MOESAIC_INLINE Vector LoadWide(const int8_t* from, float scale) {
  return ToFloat(LoadBytes(from)) * scale;
}
MOESAIC_INLINE float Wide(int8_t value, float scale) { return static_cast<float>(value) * scale; }

MOESAIC_INLINE int64_t ElementBytes(Stored type) {
  return type == Stored::kFloat32 ? 4 : type == Stored::kBFloat16 ? 2 : 1;
}

MOESAIC_INLINE float ScaleAt(const StoredRows& rows, int64_t index) {
  if (rows.scales == nullptr) return 1.0f;
  if (!rows.are_scales_bfloat16) return static_cast<const float*>(rows.scales)[index];
  return FromBFloat16(static_cast<const uint16_t*>(rows.scales)[index]);
}

// Where a group's rows of a chunk lie; `zeros` for slots that no token of the tile sees.
static void FindRows(const StoredRows& rows, int64_t kv_heads, int64_t group, const Chunk& chunk,
                     const float* zeros, const char** found) {
  const int64_t bytes = rows.stored_width * ElementBytes(rows.type);
  const char* data = static_cast<const char*>(rows.data) + group * bytes;
  for (int64_t i = 0; i < kChunkSlots; ++i) {
    const int64_t place = chunk.places[i];
    found[i] = place < 0 ? reinterpret_cast<const char*>(zeros) : data + place * kv_heads * bytes;
  }
}

// Asks memory for the next chunk of some groups, in the order in which it lies there, while this
// one is worked on.
struct Ahead {
  const Chunk* chunk;  // or null
  const char* data;
  int64_t place_bytes, bytes;  // of a place: how far apart, and how many are read
  int64_t slot, at, debt;

  Ahead(const StoredRows& rows, int64_t kv_heads, int64_t group, int64_t groups,
        const Chunk* next_chunk)
      : chunk(next_chunk), slot(0), at(0), debt(0) {
    const int64_t row_bytes = rows.stored_width * ElementBytes(rows.type);
    data = static_cast<const char*>(rows.data) + group * row_bytes;
    place_bytes = kv_heads * row_bytes, bytes = groups * row_bytes;
  }

  // As many bytes of the next chunk as were read of this one.
  void Send(int64_t count) {
    if (chunk == nullptr) return;
    debt += count;
    while (debt > 0 && slot < chunk->end) {
      const int64_t place = chunk->places[slot], end = Min(bytes, at + debt);
      if (place >= 0) {
        debt -= end - at;
        const char* row = data + place * place_bytes;
        for (; at < end; at += 64) __builtin_prefetch(row + at, 0, 2);
        if (at < bytes) return;
      }
      at = 0, ++slot;
    }
  }
};

// A group's rows of a chunk as floats, `stride` apart, zeros beside `width` of them.
template <class T>
static void WidenRows(const StoredRows& rows, int64_t kv_heads, int64_t group, const Chunk& chunk,
                      const char* const* found, Ahead* ahead, int64_t stride, float* to) {
  const int64_t width = rows.width;
  for (int64_t slot = 0; slot < chunk.end; ++slot, to += stride) {
    ahead->Send(rows.stored_width * sizeof(T));
    const int64_t place = chunk.places[slot];
    const float scale = place < 0 ? 0.0f : ScaleAt(rows, place * kv_heads + group);
    const T* from = reinterpret_cast<const T*>(found[slot]);
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) Store(to + c, LoadWide(from + c, scale));
    for (; c < width; ++c) to[c] = Wide(from[c], scale);
    for (; c < stride; ++c) to[c] = 0.0f;
  }
}

// The same for any type; points at the rows, and at `zeros` past the last that is seen.
static void CopyRows(const StoredRows& rows, int64_t kv_heads, int64_t group, const Chunk& chunk,
                     const char* const* found, Ahead* ahead, int64_t stride, const float* zeros,
                     float* to, const float** pointers) {
  switch (rows.type) {
    case Stored::kFloat32:
      WidenRows<float>(rows, kv_heads, group, chunk, found, ahead, stride, to);
      break;
    case Stored::kBFloat16:
      WidenRows<uint16_t>(rows, kv_heads, group, chunk, found, ahead, stride, to);
      break;
    case Stored::kInt8:
      WidenRows<int8_t>(rows, kv_heads, group, chunk, found, ahead, stride, to);
      break;
  }
  for (int64_t i = 0; i < kChunkSlots; ++i) pointers[i] = i < chunk.end ? to + i * stride : zeros;
}

// --- Keys with slots in the lanes ----------------------------------------------------------------

// Pairs of four bytes of a and b in each 16 bytes, of the lower and the upper half; and pairs of
// eight bytes.
#if MOESAIC_VECTOR_BYTES == 64
typedef __m512i Quads;
MOESAIC_INLINE Quads PairLow(Quads a, Quads b) { return _mm512_unpacklo_epi32(a, b); }
MOESAIC_INLINE Quads PairHigh(Quads a, Quads b) { return _mm512_unpackhi_epi32(a, b); }
MOESAIC_INLINE Quads JoinLow(Quads a, Quads b) { return _mm512_unpacklo_epi64(a, b); }
MOESAIC_INLINE Quads JoinHigh(Quads a, Quads b) { return _mm512_unpackhi_epi64(a, b); }
#elif MOESAIC_VECTOR_BYTES == 32
typedef __m256i Quads;
MOESAIC_INLINE Quads PairLow(Quads a, Quads b) { return _mm256_unpacklo_epi32(a, b); }
MOESAIC_INLINE Quads PairHigh(Quads a, Quads b) { return _mm256_unpackhi_epi32(a, b); }
MOESAIC_INLINE Quads JoinLow(Quads a, Quads b) { return _mm256_unpacklo_epi64(a, b); }
MOESAIC_INLINE Quads JoinHigh(Quads a, Quads b) { return _mm256_unpackhi_epi64(a, b); }
#else
typedef IntVector Quads;
#define MOESAIC_SHUFFLE(name, ...) \
  MOESAIC_INLINE Quads name(Quads a, Quads b) { return __builtin_shufflevector(a, b, __VA_ARGS__); }
MOESAIC_SHUFFLE(PairLow, 0, 4, 1, 5)
MOESAIC_SHUFFLE(PairHigh, 2, 6, 3, 7)
MOESAIC_SHUFFLE(JoinLow, 0, 1, 4, 5)
MOESAIC_SHUFFLE(JoinHigh, 2, 3, 6, 7)
#undef MOESAIC_SHUFFLE
#endif

// 16 bytes of every fourth of kLanes rows, from rows[0] on.
MOESAIC_INLINE Quads LoadQuads(const char* const* rows, int64_t at) {
#if MOESAIC_VECTOR_BYTES == 64
  Quads quads = _mm512_zextsi128_si512(_mm_loadu_si128((const __m128i*)(rows[0] + at)));
  quads = _mm512_inserti32x4(quads, _mm_loadu_si128((const __m128i*)(rows[4] + at)), 1);
  quads = _mm512_inserti32x4(quads, _mm_loadu_si128((const __m128i*)(rows[8] + at)), 2);
  return _mm512_inserti32x4(quads, _mm_loadu_si128((const __m128i*)(rows[12] + at)), 3);
#elif MOESAIC_VECTOR_BYTES == 32
  const Quads quads = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)(rows[0] + at)));
  return _mm256_inserti128_si256(quads, _mm_loadu_si128((const __m128i*)(rows[4] + at)), 1);
#else
  return LoadInts(rows[0] + at);
#endif
}

// Stores the channels that four bytes of each row hold, kChunkSlots apart.
MOESAIC_INLINE void StoreChannels(const float*, IntVector four, float* to) {
  Store(to, (Vector)four);
}
MOESAIC_INLINE void StoreChannels(const uint16_t*, IntVector four, float* to) {
  Store(to, (Vector)(four << 16));
  Store(to + kChunkSlots, (Vector)(four & static_cast<int32_t>(0xFFFF0000)));
}
MOESAIC_INLINE void StoreChannels(const int8_t*, IntVector four, float* to) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Store(to + i * kChunkSlots, ToFloat((four << (24 - 8 * i)) >> 24));
  }
}

// Rows of keys as floats [width][kChunkSlots], int8 ones without their scales.
template <class T>
static void TransposeKeys(const char* const* rows, int64_t width, Ahead* ahead, float* to) {
  constexpr int64_t kLine = 64, kQuad = 16, kPerFour = 4 / sizeof(T);
  const int64_t bytes = width * sizeof(T), whole = bytes / kQuad * kQuad;
  for (int64_t line = 0; line < bytes; line += kLine) {
    const int64_t end = Min(line + kLine, whole);
    for (int64_t slot = 0; slot < kChunkSlots; slot += kLanes) {
      ahead->Send(kLanes * Min(kLine, bytes - line));
      for (int64_t at = line; at < end; at += kQuad) {
        const char* const* from = rows + slot;
        const Quads a = LoadQuads(from, at), b = LoadQuads(from + 1, at);
        const Quads c = LoadQuads(from + 2, at), d = LoadQuads(from + 3, at);
        const Quads low_ab = PairLow(a, b), high_ab = PairHigh(a, b);
        const Quads low_cd = PairLow(c, d), high_cd = PairHigh(c, d);
        float* target = to + at / sizeof(T) * kChunkSlots + slot;
        constexpr int64_t kNext = kPerFour * kChunkSlots;
        const T* type = nullptr;
        StoreChannels(type, (IntVector)JoinLow(low_ab, low_cd), target);
        StoreChannels(type, (IntVector)JoinHigh(low_ab, low_cd), target + kNext);
        StoreChannels(type, (IntVector)JoinLow(high_ab, high_cd), target + 2 * kNext);
        StoreChannels(type, (IntVector)JoinHigh(high_ab, high_cd), target + 3 * kNext);
      }
    }
  }
  for (int64_t c = whole / sizeof(T); c < width; ++c) {
    for (int64_t i = 0; i < kChunkSlots; ++i) {
      to[c * kChunkSlots + i] = Wide(reinterpret_cast<const T*>(rows[i])[c], 1.0f);
    }
  }
}

}  // namespace MOESAIC_ISA
}  // namespace moesaic
