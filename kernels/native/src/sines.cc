// Cosines and sines of angles, once for all who use them: XLA's own are fused into each use of them,
// and computed anew for every head of every layer.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;

// Angles of a task: a few microseconds, what another thread's claim is worth.
constexpr int64_t kTaskAngles = 1024;

ffi::Error Sines(ffi::ThreadPool pool, F32 angles, ffi::ResultBuffer<ffi::F32> cosines,
                 ffi::ResultBuffer<ffi::F32> sines) {
  const int64_t count = angles.element_count();
  const float* from = angles.typed_data();
  float *cos = cosines->typed_data(), *sin = sines->typed_data();
  ParallelFor(pool, (count + kTaskAngles - 1) / kTaskAngles, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * kTaskAngles);
    for (int64_t i = task * kTaskAngles; i < end; ++i) {
      cos[i] = std::cos(from[i]);
      sin[i] = std::sin(from[i]);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_sines, moesaic::Sines,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>());

#pragma GCC visibility pop
