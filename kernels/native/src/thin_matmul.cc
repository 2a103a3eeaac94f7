// Products of a few rows with one matrix, which is read once as it lies: what decoding does. float32.
#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;

// Columns of a strip: rows of so many are long enough to be read one beside the other.
constexpr int64_t kLeastCols = 256;
// Bytes of the matrix that are worth another thread's claim.
constexpr int64_t kLeastBytes = 128 << 10;
constexpr int64_t kStripsPerThread = 2;

// y[T, N] = x[T, K] * w, T <= kThinRows; w is [K, N], or outputs first [N, K].
ffi::Error ThinMatmul(ffi::ThreadPool pool, F32 x, F32 w, ffi::ResultBuffer<ffi::F32> y,
                      bool outputs_first) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t outputs = y->dimensions()[1];
  if (rows < 1 || rows > kThinRows || w.dimensions()[outputs_first ? 1 : 0] != inputs ||
      w.dimensions()[outputs_first ? 0 : 1] != outputs) {
    return ffi::Error::InvalidArgument("x, w and y don't fit each other, or x has too many rows");
  }
  const int64_t least = std::max<int64_t>(outputs_first ? 1 : kLeastCols,
                                          kLeastBytes / (4 * std::max<int64_t>(1, inputs)));
  const int64_t strips =
      std::clamp<int64_t>(outputs / least, 1, kStripsPerThread * pool.num_threads());
  const int64_t cols = ((outputs + strips - 1) / strips + 15) / 16 * 16;
  const GemmKernels& kernels = *CurrentIsa().gemm;
  ParallelFor(pool, (outputs + cols - 1) / cols, [&](int64_t strip) {
    const int64_t col = strip * cols, width = std::min(cols, outputs - col);
    const float* of_strip = w.typed_data() + col * (outputs_first ? inputs : 1);
    const auto product = outputs_first ? kernels.dot : kernels.stream;
    product(x.typed_data(), inputs, of_strip, outputs_first ? inputs : outputs,
            y->typed_data() + col, outputs, rows, width, inputs);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_thin_matmul, moesaic::ThinMatmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("outputs_first"));

#pragma GCC visibility pop
