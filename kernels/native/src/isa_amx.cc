// AMX: eight tile registers of 16 rows of 64 bytes. Four hold sums, two each of x and w feed them.
#include "tiles.h"

#if defined(MOESAIC_HAS_AMX)

#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(                                               \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16"))),              \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16")
#endif

#define MOESAIC_VECTOR_BYTES 64

namespace moesaic {
namespace amx {

#include "vector.inl"
#include "quantized_vectors.inl"
#include "tile_vectors.inl"

MOESAIC_INLINE __m512 Float(__m256bh half) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
}

static void Round(const float* x, int64_t inputs, int parts, uint16_t* to) {
  const int64_t width = TileSteps(inputs) * kTileDepth;
  for (int64_t k = 0; k < width; k += 16) {
    const int64_t left = inputs - k;
    const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1;
    __m512 rest = _mm512_maskz_loadu_ps(mask, x + k);
    for (int part = 0; part < parts; ++part) {
      const __m256bh rounded = _mm512_cvtneps_pbh(rest);
      _mm256_store_si256((__m256i*)(to + part * width + k), (__m256i)rounded);
      rest = _mm512_sub_ps(rest, Float(rounded));
    }
  }
}

// Two rows of a tile from the weights of two inputs: an output's pair lies together.
MOESAIC_INLINE void StorePair(Vector first, Vector second, int parts, uint16_t* to) {
  const __m512i interleave = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  for (int part = 0; part < parts; ++part) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i pairs = _mm512_permutexvar_epi16(interleave, both);
    _mm512_store_si512(to + part * kTileSize, pairs);
    if (part + 1 == parts) break;
    first -= (Vector)_mm512_slli_epi32(pairs, 16);
    second -= (Vector)_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000));
  }
}

template <Format kFormat, int kParts>
static void PackPanel(const QuantizedMatrix& w, int64_t panel, uint16_t* to) {
  constexpr int kInputs = 32 / BitsOf(kFormat);  // of one group
  const uint8_t* bytes = w.Panel(panel);
  Vector scale = {};
  int64_t left_in_block = 0, block = 0;
  for (int64_t k = 0; k < w.inputs; k += 8) {
    if (left_in_block == 0) {
      scale = Scales(w, panel, block++, 0);
      left_in_block = w.block;
    }
    left_in_block -= 8;
    uint16_t* pairs = to + k / kTileDepth * kParts * kTileSize + k % kTileDepth * kTileSide;
#pragma GCC unroll 2
    for (int first = 0; first < 8; first += kInputs, bytes += sizeof(IntVector)) {
      const IntVector group = LoadInts(bytes);
      __builtin_prefetch(bytes + kAhead);
#pragma GCC unroll 4
      for (int i = 0; i < kInputs; i += 2) {
        StorePair(scale * Weight<kFormat>(group, i), scale * Weight<kFormat>(group, i + 1), kParts,
                  pairs + (first + i) * kTileSide);
      }
    }
  }
  for (int64_t k = w.inputs; k % kTileDepth; k += 2) {
    uint16_t* pair = to + k / kTileDepth * kParts * kTileSize + k % kTileDepth * kTileSide;
    for (int part = 0; part < kParts; ++part) {
      _mm512_store_si512(pair + part * kTileSize, _mm512_setzero_si512());
    }
  }
}

template <int kParts>
static void PackParts(const QuantizedMatrix& w, int64_t panel, uint16_t* to) {
  switch (w.format) {
    case Format::kInt8: return PackPanel<Format::kInt8, kParts>(w, panel, to);
    case Format::kInt4: return PackPanel<Format::kInt4, kParts>(w, panel, to);
    case Format::kE4m3: return PackPanel<Format::kE4m3, kParts>(w, panel, to);
  }
}

static void Pack(const QuantizedMatrix& w, int64_t panel, int parts, uint16_t* to) {
  if (parts == 1) {
    PackParts<1>(w, panel, to);
  } else {
    PackParts<2>(w, panel, to);
  }
}

static void PackHalves(const HalfMatrix& w, int64_t inputs, int64_t col, uint16_t* to) {
  const uint16_t* from = w.data + col * w.col_stride;
  for (int64_t k = 0; k < TileSteps(inputs) * kTileDepth; k += kTileDepth, to += kTileSize) {
    const int64_t left = inputs - k;
    __m512i rows[16];
    if (w.col_stride == 1) {
      for (int64_t i = 0; i < 16; ++i) {
        const uint16_t* pair = from + (k + 2 * i) * w.row_stride;
        const __m256i none = _mm256_setzero_si256();
        const __m256i first = 2 * i < left ? _mm256_loadu_si256((const __m256i*)pair) : none;
        const __m256i second =
            2 * i + 1 < left ? _mm256_loadu_si256((const __m256i*)(pair + w.row_stride)) : none;
        rows[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                                  _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
      }
    } else {
      const __mmask32 mask = left >= 32 ? 0xFFFFFFFF : (1u << left) - 1;
      for (int64_t i = 0; i < 16; ++i) {
        rows[i] = _mm512_maskz_loadu_epi16(mask, from + i * w.col_stride + k);
      }
      Transpose(rows);
    }
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * kTileDepth, rows[i]);
  }
}

// Sums of two tiles of rows by two of columns lie in tiles 0 to 3; the second of either may be
// missing.
template <bool kRows2, bool kCols2>
MOESAIC_INLINE void Multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if (kCols2) _tile_dpbf16ps(1, 4, 7);
  if (kRows2) _tile_dpbf16ps(2, 5, 6);
  if (kRows2 && kCols2) _tile_dpbf16ps(3, 5, 7);
}

// Of two parts each, the product of the lesser ones is left out.
template <bool kRows2, bool kCols2>
static void Sum(const TileRows& x, const uint16_t* w, int w_parts) {
  const int64_t steps = TileSteps(x.inputs), x_row = x.Width() * x.parts;
  const int64_t x_bytes = x_row * sizeof(uint16_t), panel = steps * w_parts * kTileSize;
  const auto load_x = [&](const uint16_t* from) __attribute__((always_inline)) {
    _tile_loadd(4, from, x_bytes);
    if (kRows2) _tile_loadd(5, from + kTileSide * x_row, x_bytes);
  };
  const auto load_w = [&](const uint16_t* from) __attribute__((always_inline)) {
    _tile_loadd(6, from, 64);
    if (kCols2) _tile_loadd(7, from + panel, 64);
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint16_t* from = x.values;
  for (int64_t step = 0; step < steps; ++step, from += kTileDepth, w += w_parts * kTileSize) {
    load_x(from);
    if (w_parts == 2) {
      load_w(w + kTileSize);
      Multiply<kRows2, kCols2>();
    }
    load_w(w);
    Multiply<kRows2, kCols2>();
    if (x.parts == 2) {
      load_x(from + x.Width());
      Multiply<kRows2, kCols2>();
    }
  }
}

// A tile of the sums to y; of the rows beyond the last none is written. The number of a tile is part
// of an instruction: the intrinsics are macros that take nothing but a literal.
#define MOESAIC_STORE_TILE(tile, rows, y, y_stride, scratch)                                     \
  do {                                                                                            \
    if ((rows) >= kTileSide) {                                                                    \
      _tile_stored(tile, y, (y_stride) * sizeof(float));                                          \
    } else {                                                                                      \
      _tile_stored(tile, scratch, kTileSide * sizeof(float));                                     \
      CopyRows(scratch, rows, y, y_stride);                                                       \
    }                                                                                             \
  } while (false)

MOESAIC_INLINE void CopyRows(const float* tile, int64_t rows, float* y, int64_t y_stride) {
  for (int64_t i = 0; i < rows; ++i) Store(y + i * y_stride, Load(tile + i * kTileSide));
}

template <bool kRows2, bool kCols2>
static void Block(const TileRows& x, const uint16_t* w, int w_parts, int64_t rows, float* y,
                  int64_t y_stride) {
  alignas(64) float scratch[kTileSide * kTileSide];
  float* second = y + kTileSide * y_stride;
  Sum<kRows2, kCols2>(x, w, w_parts);
  MOESAIC_STORE_TILE(0, rows, y, y_stride, scratch);
  if (kCols2) MOESAIC_STORE_TILE(1, rows, y + kTileSide, y_stride, scratch);
  if (kRows2) MOESAIC_STORE_TILE(2, rows - kTileSide, second, y_stride, scratch);
  if (kRows2 && kCols2) {
    MOESAIC_STORE_TILE(3, rows - kTileSide, second + kTileSide, y_stride, scratch);
  }
}

static void Product(const TileRows& x, const uint16_t* w, int w_parts, int64_t rows, int64_t cols,
                    float* y, int64_t y_stride) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t panel = TileSteps(x.inputs) * w_parts * kTileSize;
  // Two tiles of rows stay in the first-level cache while all columns pass.
  for (int64_t i = 0; i < rows; i += 2 * kTileSide) {
    const bool has_two_rows = rows - i > kTileSide;
    for (int64_t j = 0; j < cols; j += 2 * kTileSide) {
      const bool has_two_cols = cols - j > kTileSide;
      const auto block = has_two_rows ? (has_two_cols ? Block<true, true> : Block<true, false>)
                                      : (has_two_cols ? Block<false, true> : Block<false, false>);
      block(x.From(i), w + j / kTileSide * panel, w_parts, rows - i, y + i * y_stride + j,
            y_stride);
    }
  }
  _tile_release();
}

extern const TileKernels kTileKernels;
const TileKernels kTileKernels = {Round, Pack, PackHalves, Product};

}  // namespace amx
}  // namespace moesaic

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MOESAIC_HAS_AMX
