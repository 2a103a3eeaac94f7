#include "isa.h"

#include <atomic>
#include <cstring>

#include "tiles.h"

namespace moesaic {

#if defined(__x86_64__)
namespace avx512 {
extern const GemmKernels kGemmKernels;
extern const QuantizedKernels kQuantizedKernels;
extern const AttentionKernels kAttentionKernels;
extern const CachedAttentionKernels kCachedAttentionKernels;
}
namespace avx2 {
extern const GemmKernels kGemmKernels;
extern const QuantizedKernels kQuantizedKernels;
extern const AttentionKernels kAttentionKernels;
extern const CachedAttentionKernels kCachedAttentionKernels;
}
#endif
namespace baseline {
extern const GemmKernels kGemmKernels;
extern const QuantizedKernels kQuantizedKernels;
extern const AttentionKernels kAttentionKernels;
extern const CachedAttentionKernels kCachedAttentionKernels;
}

namespace {

#if defined(__x86_64__)
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

// Best first; the last runs wherever this library was built for.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx", &avx512::kGemmKernels, &avx512::kQuantizedKernels, &avx512::kAttentionKernels,
     &avx512::kCachedAttentionKernels, [] { return HasAvx512() && HasTiles(); }},
    {"avx512", &avx512::kGemmKernels, &avx512::kQuantizedKernels, &avx512::kAttentionKernels,
     &avx512::kCachedAttentionKernels, HasAvx512},
    {"avx2", &avx2::kGemmKernels, &avx2::kQuantizedKernels, &avx2::kAttentionKernels,
     &avx2::kCachedAttentionKernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", &baseline::kGemmKernels, &baseline::kQuantizedKernels, &baseline::kAttentionKernels,
     &baseline::kCachedAttentionKernels, [] { return true; }},
};

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

const Isa& CurrentIsa() {
  if (const Isa* isa = chosen.load(std::memory_order_acquire)) return *isa;
  for (const Isa& isa : kIsas) {
    if (isa.is_supported()) {
      chosen.store(&isa, std::memory_order_release);
      break;
    }
  }
  return *chosen.load(std::memory_order_acquire);
}

bool UseIsa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.is_supported()) {
      chosen.store(&isa, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace moesaic
