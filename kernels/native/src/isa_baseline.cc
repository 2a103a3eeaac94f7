// What every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit Arm, and whatever
// the compiler makes of vectors of four floats elsewhere.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>

#include "attention.h"
#include "cached_attention.h"
#include "gemm.h"
#include "quantized.h"

#define MOESAIC_ISA baseline
#define MOESAIC_ISA_NAME "baseline"
#define MOESAIC_VECTOR_BYTES 16
#define MOESAIC_TILE_VECTORS 4
#if defined(__aarch64__)  // 32 registers: 24 sums, 4 of B, 1 of A
#define MOESAIC_TILE_ROWS 6
#else  // 16 registers: 8 sums, 4 of B, 1 of A
#define MOESAIC_TILE_ROWS 2
#endif
#include "gemm_kernels.inl"
#include "quantized_kernels.inl"
#include "attention_kernels.inl"
#include "cached_slots.inl"
#include "cached_products.inl"
#include "cached_attention_kernels.inl"
