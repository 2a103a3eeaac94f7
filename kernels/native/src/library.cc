// What Python asks of the library itself; see kernels/native/library.py.
#include "isa.h"

#define MOESAIC_EXPORT extern "C" __attribute__((visibility("default")))

// The hash of the sources that this library was built from.
MOESAIC_EXPORT const char* moesaic_source_hash() { return MOESAIC_SOURCE_HASH; }

MOESAIC_EXPORT const char* moesaic_isa() { return moesaic::CurrentIsa().name; }

MOESAIC_EXPORT bool moesaic_use_isa(const char* name) { return moesaic::UseIsa(name); }
