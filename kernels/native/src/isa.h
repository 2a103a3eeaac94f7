// The instruction sets that this library has code for, and which of them is in use.
#ifndef MOESAIC_ISA_H_
#define MOESAIC_ISA_H_

#include "attention.h"
#include "cached_attention.h"
#include "gemm.h"
#include "quantized.h"

namespace moesaic {

// Everything that differs between instruction sets.
struct Isa {
  const char* name;
  const GemmKernels* gemm;
  const QuantizedKernels* quantized;
  const AttentionKernels* attention;
  const CachedAttentionKernels* cached_attention;
  bool (*is_supported)();
};

// The best that this processor has, unless UseIsa chose another.
const Isa& CurrentIsa();

// Chooses one by its name, for tests; false where this processor or this build lacks it.
bool UseIsa(const char* name);

}  // namespace moesaic

#endif  // MOESAIC_ISA_H_
