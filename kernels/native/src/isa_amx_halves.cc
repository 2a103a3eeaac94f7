// AMX: products of two matrices in bfloat16. Four tiles of sums, two of rows, two of columns.
#include "halves.h"

#if defined(MOESAIC_HAS_AMX)

#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(                                               \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#endif

#define MOESAIC_VECTOR_BYTES 64

namespace moesaic {
namespace amx {

#include "vector.inl"
#include "tile_vectors.inl"

MOESAIC_INLINE __mmask32 MaskOf(int64_t count) {
  return count >= 32 ? 0xFFFFFFFF : count <= 0 ? 0 : (1u << count) - 1;
}

// 32 numbers in bfloat16 of the first that the mask has; zeros beside them.
MOESAIC_INLINE __m512i Load32(const uint16_t* from, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, from);
}
MOESAIC_INLINE __m512i Load32(const float* from, __mmask32 mask) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 pairs: one of each from either row.
MOESAIC_INLINE __m512i LoadPairs(const uint16_t* first, const uint16_t* second, __mmask16 of_first,
                                 __mmask16 of_second) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_first, first));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_second, second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
MOESAIC_INLINE __m512i LoadPairs(const float* first, const float* second, __mmask16 of_first,
                                 __mmask16 of_second) {
  const __m512i interleave = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  const __m512 low = _mm512_maskz_loadu_ps(of_first, first);
  const __m512 high = _mm512_maskz_loadu_ps(of_second, second);
  return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// One tile of up to 16 vectors of up to 32 inputs: a vector's inputs in a row (of a left operand),
// or an input pair's vectors in a row (of a right one).
template <class Element, bool kIsRight>
MOESAIC_INLINE void PackTile(const Element* from, int64_t depth_stride, int64_t stride,
                             int64_t depth, int64_t count, uint16_t* to) {
  __m512i rows[16];
  if (depth_stride == 1) {
    const __mmask32 mask = MaskOf(depth);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      rows[i] = i < count ? Load32(from + i * stride, mask) : _mm512_setzero_si512();
    }
  } else {
    const __mmask16 mask = MaskOf(count < 16 ? count : 16);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      const Element* pair = from + 2 * i * depth_stride;
      const bool has_both = 2 * i + 1 < depth;
      rows[i] = LoadPairs(pair, has_both ? pair + depth_stride : pair, 2 * i < depth ? mask : 0,
                          has_both ? mask : 0);
    }
  }
  if ((depth_stride == 1) == kIsRight) Transpose(rows);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * kTileDepth, rows[i]);
}

template <class Element, bool kIsRight>
static void PackPair(const Element* from, int64_t depth_stride, int64_t stride, int64_t depth,
                     int64_t count, uint16_t* to) {
  for (int64_t k = 0; k < depth; k += kTileDepth, to += 2 * kTileSize) {
    const Element* first = from + k * depth_stride;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t begin = half * kTileSide;
      if (count > begin) {
        PackTile<Element, kIsRight>(first + begin * stride, depth_stride, stride, depth - k,
                                    count - begin, to + half * kTileSize);
      } else {
        for (int64_t i = 0; i < kTileSize; i += 32) {
          _mm512_store_si512(to + half * kTileSize + i, _mm512_setzero_si512());
        }
      }
    }
  }
}

static void PackLeft(const HalfOperand& a, int64_t count, int64_t depth, uint16_t* to) {
  if (a.is_float) {
    PackPair<float, false>(static_cast<const float*>(a.data), a.col_stride, a.row_stride, depth,
                           count, to);
  } else {
    PackPair<uint16_t, false>(static_cast<const uint16_t*>(a.data), a.col_stride, a.row_stride,
                              depth, count, to);
  }
}

static void PackRight(const HalfOperand& b, int64_t count, int64_t depth, uint16_t* to) {
  if (b.is_float) {
    PackPair<float, true>(static_cast<const float*>(b.data), b.row_stride, b.col_stride, depth,
                          count, to);
  } else {
    PackPair<uint16_t, true>(static_cast<const uint16_t*>(b.data), b.row_stride, b.col_stride,
                             depth, count, to);
  }
}

// Sums of two tiles of rows by two of columns in tiles 0 to 3, from zero or from `sums`. Meanwhile
// the lines of memory that the next sums go to are asked for: `next` rows, `row_bytes` apart.
MOESAIC_INLINE void Sum(const uint16_t* a, const uint16_t* b, int64_t steps, const float* sums,
                        const char* next, int64_t row_bytes) {
  if (sums == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (int64_t step = 0; step < steps; ++step, a += 2 * kTileSize, b += 2 * kTileSize) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileSize, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTileSize, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (step < 8) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, next += row_bytes) __builtin_prefetch(next, 1);
    }
  }
}

MOESAIC_INLINE void KeepSums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// The first `rows` by `cols` of four tiles of sums to y.
MOESAIC_INLINE void Finish(const float* sums, int64_t rows, int64_t cols, const HalfResult& y) {
  const __mmask32 mask = MaskOf(cols);
  for (int64_t i = 0; i < rows && i < kPairSide; ++i) {
    const float* from = sums + i / kTileSide * 512 + i % kTileSide * kTileSide;
    const __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + 256);
    if (y.is_float) {
      float* to = static_cast<float*>(y.data) + i * y.stride;
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), low);
      _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(mask >> 16), high);
    } else {
      uint16_t* to = static_cast<uint16_t*>(y.data) + i * y.stride;
      _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

static void Product(const uint16_t* a, const uint16_t* b, int64_t b_pair, int64_t depth,
                    int64_t rows, int64_t cols, const HalfResult& y, float* sums, bool is_first,
                    bool is_last) {
  alignas(64) float finished[kPairSums];
  const int64_t steps = TileSteps(depth), row_bytes = y.stride * (y.is_float ? 4 : 2);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t j = 0; j < cols; j += kPairSide, b += b_pair, sums += kPairSums) {
    const HalfResult to = y.From(0, j);
    const char* next = static_cast<const char*>(y.From(0, j + kPairSide).data);
    Sum(a, b, steps, is_first ? nullptr : sums, next, is_last ? row_bytes : 0);
    KeepSums(is_last ? finished : sums);
    if (is_last) Finish(finished, rows, cols - j, to);
  }
  _tile_release();
}

extern const HalfTileKernels kHalfTileKernels;
const HalfTileKernels kHalfTileKernels = {PackLeft, PackRight, Product};

}  // namespace amx

}  // namespace moesaic

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // MOESAIC_HAS_AMX
