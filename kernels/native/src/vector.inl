// Vectors of floats in the compiler's own notation, for the instruction set of the file that
// includes this. No function of the standard library may be called from such a file: the linker
// could keep its copy of a template, with instructions that another processor lacks.
//
// The including file defines MOESAIC_VECTOR_BYTES.

constexpr int64_t kLanes = MOESAIC_VECTOR_BYTES / sizeof(float);

typedef float Vector __attribute__((vector_size(MOESAIC_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(MOESAIC_VECTOR_BYTES)));
typedef float Vector4 __attribute__((vector_size(16)));

#define MOESAIC_INLINE static inline __attribute__((always_inline))

MOESAIC_INLINE Vector Load(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

MOESAIC_INLINE void Store(float* to, Vector vector) { __builtin_memcpy(to, &vector, sizeof(vector)); }

// Subtracting zero is exact and compiles to a broadcast alone; adding it would not (-0 + 0 is 0).
MOESAIC_INLINE Vector Broadcast(float value) { return value - Vector{}; }

// Floats of kLanes numbers in bfloat16.
MOESAIC_INLINE Vector LoadHalves(const uint16_t* from) {
#if MOESAIC_VECTOR_BYTES == 64  // of the general form the compiler makes four times as much
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#elif MOESAIC_VECTOR_BYTES == 32
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
  typedef uint16_t Halves __attribute__((vector_size(MOESAIC_VECTOR_BYTES / 2)));
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return (Vector)(__builtin_convertvector(halves, IntVector) << 16);
#endif
}

MOESAIC_INLINE Vector4 Load4(const float* from) {
  Vector4 vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

MOESAIC_INLINE void Store4(float* to, Vector4 vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}
