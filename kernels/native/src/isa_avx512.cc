// 32 registers of 16 floats: 24 sums, 2 of B, 1 of A.
#if defined(__x86_64__)

#if !defined(__clang__)  // GCC 12 warns of its own header's undefined vectors
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "attention.h"
#include "cached_attention.h"
#include "gemm.h"
#include "quantized.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif

#define MOESAIC_ISA avx512
#define MOESAIC_ISA_NAME "avx512"
#define MOESAIC_VECTOR_BYTES 64
#define MOESAIC_TILE_ROWS 12
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
