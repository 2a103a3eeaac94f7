// Products of queries with cached keys and of weights with values, and the softmax between them,
// for one instruction set; included by isa_*.cc after cached_slots.inl.
//
// For scores, slots lie in the lanes of vectors; for the sums of values, channels do. Each sum is
// made in the order of channels or of slots, by however many queries at a time: so a token's result
// has the same bits in any tile.

namespace moesaic {
namespace MOESAIC_ISA {

// Vectors that so many queries take at a time: their sums fill the registers.
constexpr int VectorsFor(int queries) {
  return queries * 4 <= kTileRows * kTileVectors ? 4 : static_cast<int>(kTileVectors);
}
static_assert(kChunkVectors % 4 == 0 && kChunkVectors % kTileVectors == 0, "no strip is cut");

// --- Products ------------------------------------------------------------------------------------

// scores[queries, kChunkSlots] = scale * queries[width, queries] * keys[width, kChunkSlots].
template <int kQueryRows>
static void ScoreRows(int64_t width, float scale, const float* queries, const float* keys,
                      float* scores) {
  constexpr int kVectors = VectorsFor(kQueryRows);
  for (int64_t begin = 0; begin < kChunkSlots; begin += kVectors * kLanes) {
    Vector sums[kQueryRows][kVectors] = {};
    const float* query = queries;
    const float* key = keys + begin;
    for (int64_t c = 0; c < width; ++c, query += kQueryRows, key += kChunkSlots) {
      Vector row[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) row[j] = Load(key + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kQueryRows; ++i) {
        const Vector factor = Broadcast(query[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * row[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kQueryRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        Store(scores + i * kChunkSlots + begin + j * kLanes, sums[i][j] * scale);
      }
    }
  }
}

// Rows of values [kChunkSlots], of which `count` have weights, and what is sent for beside them.
struct ValueRows {
  const float* const* rows;
  Ahead* ahead;  // or null
  int64_t count;
};

// kVectors of out's columns: out = out * shrink + weights[queries, count] * rows[count].
template <int kQueryRows, int kVectors>
MOESAIC_INLINE void ValueStrip(const float* weights, const ValueRows& values, int64_t column,
                               const float* shrink, float* out, int64_t stride) {
  Vector sums[kQueryRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kQueryRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = Load(out + i * stride + column + j * kLanes) * Broadcast(shrink[i]);
    }
  }
  for (int64_t slot = 0; slot < values.count; ++slot) {
    const float* from = values.rows[slot] + column;
    if (values.ahead != nullptr && slot % 4 == 0) values.ahead->Send(4 * kVectors * sizeof(Vector));
    Vector row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = Load(from + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kQueryRows; ++i) {
      const Vector weight = Broadcast(weights[i * kChunkSlots + slot]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += weight * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kQueryRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) Store(out + i * stride + column + j * kLanes, sums[i][j]);
  }
}

template <int kQueryRows>
static void ValueStrips(const float* weights, const ValueRows& values, const float* shrink,
                        float* out, int64_t stride) {
  constexpr int kVectors = VectorsFor(kQueryRows);
  int64_t column = 0;
  for (; column + kVectors * kLanes <= stride; column += kVectors * kLanes) {
    ValueStrip<kQueryRows, kVectors>(weights, values, column, shrink, out, stride);
  }
  for (; column < stride; column += kLanes) {
    ValueStrip<kQueryRows, 1>(weights, values, column, shrink, out, stride);
  }
}

template <int kQueryRows>
static void Score(int64_t queries, int64_t width, float scale, const float* packed,
                  const float* keys, float* scores) {
  if (queries == kQueryRows) return ScoreRows<kQueryRows>(width, scale, packed, keys, scores);
  if constexpr (kQueryRows > 1) {
    Score<kQueryRows - 1>(queries, width, scale, packed, keys, scores);
  }
}

template <int kQueryRows>
static void AddValues(int64_t queries, const float* weights, const ValueRows& values,
                      const float* shrink, float* out, int64_t stride) {
  if (queries == kQueryRows) {
    return ValueStrips<kQueryRows>(weights, values, shrink, out, stride);
  }
  if constexpr (kQueryRows > 1) {
    AddValues<kQueryRows - 1>(queries, weights, values, shrink, out, stride);
  }
}

// --- Softmax -------------------------------------------------------------------------------------

MOESAIC_INLINE float HighestOf(Vector vector) {
  float lanes[kLanes];
  Store(lanes, vector);
  Vector4 top = Load4(lanes);
  for (int64_t i = 4; i < kLanes; i += 4) {
    const Vector4 other = Load4(lanes + i);
    top = other > top ? other : top;
  }
  const float a = top[0] > top[1] ? top[0] : top[1], b = top[2] > top[3] ? top[2] : top[3];
  return a > b ? a : b;
}

MOESAIC_INLINE float SumOf(const float* lanes) {
  Vector4 sum = Load4(lanes);
  for (int64_t i = 4; i < kLanes; i += 4) sum += Load4(lanes + i);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Weights exp(score - highest) of up to kTileRows queries in place of their scores. highest and the
// sums of each lane take the chunk in; `shrink` is what earlier sums of values are multiplied with.
static void Weigh(int64_t queries, float* scores, float* highest, float* sums, float* shrink) {
  constexpr int64_t kPadded = (kTileRows + kLanes - 1) / kLanes * kLanes;
  float before[kPadded], tops[kPadded], factors[kPadded];
  for (int64_t i = 0; i < kPadded; ++i) before[i] = tops[i] = kNothingSeen;
  for (int64_t i = 0; i < queries; ++i) {
    const float* row = scores + i * kChunkSlots;
    Vector top = Load(row);
    for (int64_t v = 1; v < kChunkVectors; ++v) {
      const Vector score = Load(row + v * kLanes);
      top = score > top ? score : top;
    }
    before[i] = highest[i], tops[i] = HighestOf(top);
  }
  for (int64_t i = 0; i < kPadded; i += kLanes) {
    const Vector old = Load(before + i), found = Load(tops + i);
    const Vector top = found > old ? found : old;
    Store(tops + i, top);
    Store(factors + i, Exp(old - top));
  }
  for (int64_t i = 0; i < queries; ++i) {
    float* row = scores + i * kChunkSlots;
    const Vector top = Broadcast(tops[i]);
    Vector sum = Load(sums + i * kLanes) * Broadcast(factors[i]);
    for (int64_t v = 0; v < kChunkVectors; ++v) {
      const Vector weight = Exp(Load(row + v * kLanes) - top);
      Store(row + v * kLanes, weight);
      sum += weight;
    }
    Store(sums + i * kLanes, sum);
    highest[i] = tops[i], shrink[i] = factors[i];
  }
}

}  // namespace MOESAIC_ISA
}  // namespace moesaic
