// Attention of new tokens over what a layer keeps of their sequences.
#ifndef MOESAIC_CACHED_ATTENTION_H_
#define MOESAIC_CACHED_ATTENTION_H_

#include <cstdint>

namespace moesaic {

// Slots of a row that are looked at together, and slots whose softmax is summed by itself. Both cut
// every row at the same places, whoever asks: so a token's sums have one order, whatever else is in
// the call and however it is shared out.
constexpr int64_t kChunkSlots = 64;
constexpr int64_t kPartSlots = 256;
static_assert(kPartSlots % kChunkSlots == 0, "parts are whole chunks");

enum class Stored { kFloat32, kBFloat16, kInt8 };

// Keys or values as they are stored: [places, G, stored_width], of which `width` are used. A place
// is a slot of a row or a position of a page.
struct StoredRows {
  const void* data;
  Stored type;
  const void* scales;  // [places, G] for int8: float32 or bfloat16
  bool are_scales_bfloat16;
  int64_t stored_width, width;
};

// The positions that a chunk of slots holds: -1 in `lowest` where some slot is empty, kNoPosition
// in `lowest_held` where all are.
struct ChunkSummary {
  int32_t lowest, lowest_held, highest;
};
constexpr int32_t kNoPosition = 0x7FFFFFFF;
// The highest score of none.
constexpr float kNothingSeen = -1e30f;

// One call's operands: T tokens, H query heads, G key/value heads, R rows of S slots, or of N pages
// of Z positions. What kernels/cached_attention/api.py says of them holds.
struct CachedAttention {
  int64_t tokens, heads, kv_heads;
  int64_t num_rows, slots;           // slots: S, or N * Z
  int64_t page_size, num_pages;      // page_size 0: rows of slots
  int64_t window;                    // 0: none
  int64_t num_sinks;
  float scale;
  const float* q;                    // [T, H, C]
  StoredRows keys, values;
  bool are_values_keys;              // values are the first entries of the keys
  const int32_t* rows;               // [T]
  const int32_t* positions;          // [T]
  const int32_t* slot_positions;     // [R, S] or null
  const int32_t* tables;             // [R, N] or null
  const ChunkSummary* summaries;     // [R, NumChunks()], of the rows in use; null with tables
  const float* sink_logits;          // [H] or null
  float* out;                        // [T, H, W]: sums of exp(score - highest) * v until Finish
  float* highest;                    // [T, H]
  float* totals;                     // [T, H]
  int32_t* wrong_page;               // set to 1 where a page that is seen is none

  int64_t heads_per_group() const { return heads / kv_heads; }
  int64_t NumChunks() const { return (slots + kChunkSlots - 1) / kChunkSlots; }
  int64_t NumParts() const { return (slots + kPartSlots - 1) / kPartSlots; }
};

// Tokens of one row that follow each other, and query heads of which all or one group share keys.
// Its queries are ordered by group, then by token, then by head.
struct TokenTile {
  int64_t token, num_tokens;
  int64_t head, num_heads;

  int64_t NumQueries() const { return num_tokens * num_heads; }
};

// What one instruction set brings; see cached_attention_kernels.inl.
struct CachedAttentionKernels {
  // Floats of scratch that `attend` needs, aligned to 64 bytes, and floats of a partial result.
  int64_t (*scratch)(const CachedAttention& a, int64_t queries);
  int64_t (*partial)(const CachedAttention& a, int64_t queries);
  // The summaries of one row's chunks.
  void (*summarize)(const int32_t* slot_positions, int64_t slots, ChunkSummary* summaries);
  // Whether some token of the tile may see a slot of the part.
  bool (*may_see)(const CachedAttention& a, const TokenTile& tile, int64_t part);
  // The tile's sums over each of `count` parts, one partial result after the other.
  void (*attend)(const CachedAttention& a, const TokenTile& tile, int64_t part, int64_t count,
                 float* partials, float* scratch);
  // Adds `count` partial results of the tile to out, highest and totals.
  void (*merge)(const CachedAttention& a, const TokenTile& tile, int64_t count,
                const float* partials);
  // Divides the sums of tokens [begin, end) by their totals.
  void (*finish)(const CachedAttention& a, int64_t begin, int64_t end);
};

}  // namespace moesaic

#endif  // MOESAIC_CACHED_ATTENTION_H_
