#include "tiles.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "isa.h"

#if defined(MOESAIC_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moesaic {

int64_t TileCols(int64_t inputs, int parts) {
  constexpr int64_t kBytes = 256 << 10;
  const int64_t pair_bytes = 2 * TileSteps(inputs) * parts * kTileSize * sizeof(uint16_t);
  return std::max<int64_t>(1, kBytes / std::max<int64_t>(pair_bytes, 1)) * 2 * kTileSide;
}

void TileProduct(const TileRows& x, const PackTiles& pack, int w_parts, int64_t rows, int64_t cols,
                 float* y, int64_t y_stride) {
  thread_local Buffer buffer;
  const int64_t panel = TileSteps(x.inputs) * w_parts * kTileSize;
  uint16_t* tiles = buffer.Get<uint16_t>(cols / kTileSide * panel);
  for (int64_t col = 0; col < cols; col += kTileSide) pack(col, tiles + col / kTileSide * panel);
  CurrentTiles()->product(x, tiles, w_parts, rows, cols, y, y_stride);
}

#if defined(MOESAIC_HAS_AMX)

namespace amx {
extern const TileKernels kTileKernels;
}

namespace {

// Of Linux' asm/prctl.h, which older headers lack: a process asks for the state of the tiles, which
// makes a thread's context 8 KB larger.
constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
constexpr uint64_t kTileState = 3u << 17;   // what the system saves: configuration and data

uint64_t SavedState() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

}  // namespace

bool HasTiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
  if ((SavedState() & kTileState) != kTileState) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 24 & 1) || !(d >> 22 & 1)) return false;  // AMX-TILE, AMX-BF16
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512-BF16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const TileKernels* CurrentTiles() {
  return std::strcmp(CurrentIsa().name, "amx") == 0 ? &amx::kTileKernels : nullptr;
}

#else

bool HasTiles() { return false; }

const TileKernels* CurrentTiles() { return nullptr; }

#endif

}  // namespace moesaic
