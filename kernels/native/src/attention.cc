#include "attention.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace moesaic {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// Parts of a group's queries that a thread should find, in a call of few rows and groups.
constexpr int64_t kTasksPerThread = 4;

// Positions and segments with padding after the last row, and each segment's first row.
struct PaddedRows {
  std::vector<int32_t> positions, segments, starts;

  PaddedRows(const S32& positions_BL, const S32& segments_BL) {
    const int64_t batch = positions_BL.dimensions()[0], length = positions_BL.dimensions()[1];
    const int64_t padded = PaddedLength(length);
    positions.assign(batch * padded, -1);
    segments.assign(batch * padded, 0);
    starts.assign(batch * padded, 0);
    for (int64_t b = 0; b < batch; ++b) {
      const int32_t* from = segments_BL.typed_data() + b * length;
      std::copy_n(positions_BL.typed_data() + b * length, length, &positions[b * padded]);
      std::copy_n(from, length, &segments[b * padded]);
      for (int64_t i = 1; i < length; ++i) {
        const bool is_same = from[i] == from[i - 1];
        starts[b * padded + i] = is_same ? starts[b * padded + i - 1] : static_cast<int32_t>(i);
      }
    }
  }
};

// The operands that both directions share; positions and segments are padded's.
ffi::ErrorOr<Attention> Operands(const F32& q, const F32& k, const F32& v, const S32& positions,
                                 const S32& segments, const PaddedRows& padded, int64_t window,
                                 int64_t num_sinks, bool gaps) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions();
  const auto rows = positions.dimensions();
  if (qs.size() != 4 || ks.size() != 4 || vs.size() != 4 || rows.size() != 2 ||
      segments.dimensions().size() != 2 || segments.dimensions()[0] != rows[0] ||
      segments.dimensions()[1] != rows[1] || ks[0] != qs[0] || ks[1] != qs[1] || ks[3] != qs[3] ||
      vs[0] != qs[0] || vs[1] != qs[1] || vs[2] != ks[2] || rows[0] != qs[0] || rows[1] != qs[1] ||
      ks[2] == 0 || qs[2] % ks[2]) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("q, k, v and rows don't fit each other"));
  }
  Attention a = {};
  a.batch = qs[0], a.length = qs[1], a.heads = qs[2], a.kv_heads = ks[2];
  a.width = qs[3], a.value_width = vs[3];
  a.window = window, a.num_sinks = window > 0 ? num_sinks : 0, a.gaps = gaps;
  a.q = q.typed_data(), a.k = k.typed_data(), a.v = v.typed_data();
  a.positions = padded.positions.data(), a.segments = padded.segments.data();
  a.starts = padded.starts.data();
  return a;
}

ffi::Error Forward(ffi::ThreadPool pool, F32 q, F32 k, F32 v, S32 positions, S32 segments,
                   F32 sink_logits, ffi::ResultBuffer<ffi::F32> out,
                   ffi::ResultBuffer<ffi::F32> log_sums, int64_t window, int64_t num_sinks,
                   bool gaps) {
  const PaddedRows padded(positions, segments);
  auto operands = Operands(q, k, v, positions, segments, padded, window, num_sinks, gaps);
  if (!operands.has_value()) return operands.error();
  Attention& a = *operands;
  if (sink_logits.element_count() == static_cast<size_t>(a.heads)) {
    a.sink_logits = sink_logits.typed_data();
  }
  a.out = out->typed_data(), a.log_sums = log_sums->typed_data();
  const AttentionKernels& kernels = *CurrentIsa().attention;
  const int64_t queries = a.length * a.heads_per_group();
  const int64_t panels = (queries + kernels.panel_queries - 1) / kernels.panel_queries;
  const int64_t groups = a.batch * a.kv_heads;
  // Each part packs the group's keys again.
  const int64_t wanted = kTasksPerThread * pool.num_threads();
  const int64_t parts = groups ? std::clamp<int64_t>(wanted / groups, 1, panels) : 1;
  const int64_t floats = kernels.forward_scratch(a);
  ParallelFor(pool, groups * parts, [&](int64_t task) {
    const int64_t group = task / parts, part = task % parts;
    kernels.forward(a, group / a.kv_heads, group % a.kv_heads, part * panels / parts,
                    (part + 1) * panels / parts, ThreadScratch(floats));
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, F32 q, F32 k, F32 v, S32 positions, S32 segments,
                    F32 log_sums, F32 d_out, F32 delta, ffi::ResultBuffer<ffi::F32> dq,
                    ffi::ResultBuffer<ffi::F32> dk, ffi::ResultBuffer<ffi::F32> dv, int64_t window,
                    int64_t num_sinks, bool gaps) {
  const PaddedRows padded(positions, segments);
  auto operands = Operands(q, k, v, positions, segments, padded, window, num_sinks, gaps);
  if (!operands.has_value()) return operands.error();
  Attention& a = *operands;
  a.log_sums = const_cast<float*>(log_sums.typed_data());
  a.d_out = d_out.typed_data(), a.delta = delta.typed_data();
  a.dq = dq->typed_data(), a.dk = dk->typed_data(), a.dv = dv->typed_data();
  const AttentionKernels& kernels = *CurrentIsa().attention;
  const int64_t floats = kernels.backward_scratch(a);
  ParallelFor(pool, a.batch * a.kv_heads, [&](int64_t task) {
    kernels.backward(a, task / a.kv_heads, task % a.kv_heads, ThreadScratch(floats));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moesaic

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_attention_forward, moesaic::Forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("num_sinks")
                                  .Attr<bool>("gaps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moesaic_attention_backward, moesaic::Backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("num_sinks")
                                  .Attr<bool>("gaps"));

#pragma GCC visibility pop
