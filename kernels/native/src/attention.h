// Causal attention over windows and sinks of packed documents, forward and backward.
#ifndef MOESAIC_ATTENTION_H_
#define MOESAIC_ATTENTION_H_

#include <cstdint>

namespace moesaic {

// One call's operands: B rows of the batch, L rows (queries and keys), H query heads of which R
// share one of the G key/value heads, C head_dim, W width of values; all float32. What
// kernels/window_attention/api.py says of them holds.
struct Attention {
  int64_t batch, length, heads, kv_heads, width, value_width;
  int64_t window;  // 0: none
  int64_t num_sinks;
  bool gaps;
  const float* q;  // [B, L, H, C]
  const float* k;  // [B, L, G, C]
  const float* v;  // [B, L, G, W]
  // [B, PaddedLength(L)], the rows after L at position -1, which is padding.
  const int32_t* positions;
  const int32_t* segments;
  const int32_t* starts;      // the first row of each row's segment
  const float* sink_logits;   // [H] or null
  float* out;                 // [B, L, H, W]
  float* log_sums;            // [B, L, H]: of the exponentials; kNothing where nothing is visible
  // Backward only. log_sums is read.
  const float* d_out;         // [B, L, H, W]
  const float* delta;         // [B, L, H]: sum of out * d_out over W
  float* dq;
  float* dk;
  float* dv;

  int64_t heads_per_group() const { return heads / kv_heads; }
};

// The log of the sum of no exponentials, as a number that takes every score to zero.
constexpr float kNothing = 1e30f;

// Keys are packed in whole tiles of rows on every instruction set.
constexpr int64_t kKeyAlignment = 12;

inline int64_t PaddedLength(int64_t length) {
  return (length + kKeyAlignment - 1) / kKeyAlignment * kKeyAlignment;
}

// What one instruction set brings; see attention_kernels.inl. A panel is `panel_queries` pairs of a
// row and a head of one key/value group, row by row.
struct AttentionKernels {
  int64_t panel_queries;
  // Floats that `forward` and `backward` need as scratch, aligned to 64 bytes.
  int64_t (*forward_scratch)(const Attention& a);
  int64_t (*backward_scratch)(const Attention& a);
  // out and log_sums of panels [begin, end) of one batch row and group.
  void (*forward)(const Attention& a, int64_t row, int64_t group, int64_t begin, int64_t end,
                  float* scratch);
  // dq, dk and dv of one batch row and group.
  void (*backward)(const Attention& a, int64_t row, int64_t group, float* scratch);
};

}  // namespace moesaic

#endif  // MOESAIC_ATTENTION_H_
