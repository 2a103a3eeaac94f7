// Vectors of floats in the compiler's own notation, for the instruction set of the file that
// includes this. No function of the standard library may be called from such a file: the linker
// could keep its copy of a template, with instructions that another processor lacks.
//
// The including file defines MOESAIC_VECTOR_BYTES.

constexpr int64_t kLanes = MOESAIC_VECTOR_BYTES / sizeof(float);

typedef float Vector __attribute__((vector_size(MOESAIC_VECTOR_BYTES)));
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

MOESAIC_INLINE Vector4 Load4(const float* from) {
  Vector4 vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

MOESAIC_INLINE void Store4(float* to, Vector4 vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}
