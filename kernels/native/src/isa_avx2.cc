// 16 registers of 8 floats: 12 sums, 2 of B, 1 of A.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#include "attention.h"
#include "cached_attention.h"
#include "gemm.h"
#include "quantized.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define MOESAIC_ISA avx2
#define MOESAIC_ISA_NAME "avx2"
#define MOESAIC_VECTOR_BYTES 32
#define MOESAIC_TILE_ROWS 6
#define MOESAIC_TILE_VECTORS 2
#include "gemm_kernels.inl"
#include "quantized_kernels.inl"
#include "attention_kernels.inl"
#include "cached_slots.inl"
#include "cached_products.inl"
#include "cached_attention_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
