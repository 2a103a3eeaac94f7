// Rounding a panel of floats to few bits; included inside an instruction set's namespace, behind
// quantized_vectors.inl.

MOESAIC_INLINE Vector Abs(Vector x) { return (Vector)((IntVector)x & 0x7FFFFFFF); }

MOESAIC_INLINE Vector Larger(Vector a, Vector b) { return a > b ? a : b; }

MOESAIC_INLINE Vector Clip(Vector x, float least, float largest) {
  const Vector above = x < least ? Broadcast(least) : x;
  return above > largest ? Broadcast(largest) : above;
}

// To the nearest whole number, the even one of two; |x| < 2^22.
MOESAIC_INLINE Vector RoundToEven(Vector x) {
  const Vector shift = Broadcast(0x1.8p23f);
  return (x + shift) - shift;
}

// Codes of e4m3, of |x| <= 448. Numbers below 2^-6 have no leading one.
MOESAIC_INLINE IntVector ToE4m3(Vector x) {
  const IntVector bits = (IntVector)x, magnitude = bits & 0x7FFFFFFF;
  const IntVector normal =
      ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);  // biases 127 and 7
  const IntVector small = __builtin_convertvector(RoundToEven(Abs(x) * 0x1p9f), IntVector);
  return ((bits >> 24) & 0x80) | (magnitude < 121 << 23 ? small : normal);
}

// A scale as it is kept, never below what it was; scale >= 0.
MOESAIC_INLINE Vector KeptScale(Vector scale, bool is_bfloat16) {
  if (!is_bfloat16) return scale;
  return (Vector)(((IntVector)scale + 0xFFFF) & static_cast<int32_t>(0xFFFF0000));
}

MOESAIC_INLINE Vector Divisor(Vector scale) { return scale != 0.0f ? scale : Broadcast(1.0f); }

// The scale that rounds the block's 16 outputs best; see kernels/quantize/api.py: _best_scales.
static void BestScales(const Rounding& rounding, const float* block, int64_t inputs, float* best) {
  const bool is_signed = -rounding.least > rounding.largest;
  for (int64_t part = 0; part < kParts; ++part, block += kLanes) {
    Vector largest = {}, highest = Load(block);
    for (int64_t k = 0; k < inputs; ++k) {
      const Vector w = Load(block + k * kPanelOutputs);
      largest = Larger(Abs(w), largest);
      highest = Larger(w, highest);
    }
    Vector chosen = {}, least_error = Broadcast(__builtin_inff());
    for (int64_t i = 0; i < rounding.num_steps; ++i) {
      const float step = rounding.steps[i];
      const Vector up = KeptScale(largest / step, rounding.are_scales_bfloat16);
      const Vector scale = is_signed ? (highest == largest ? -up : up) : up;
      if (rounding.num_steps == 1) {
        chosen = scale;
        break;
      }
      const Vector divisor = Divisor(scale);
      Vector error = {};
      for (int64_t k = 0; k < inputs; ++k) {
        const Vector ratio = Load(block + k * kPanelOutputs) / divisor;
        const Vector off = Clip(RoundToEven(ratio), rounding.least, rounding.largest) - ratio;
        error += off / step * (off / step);
      }
      const IntVector is_better = error < least_error;
      chosen = is_better ? scale : chosen;
      least_error = i == 0 ? error / rounding.found_again : is_better ? error : least_error;
    }
    Store(best + part * kLanes, chosen);
  }
}

// A number as it is kept, the nearest there is.
MOESAIC_INLINE Vector Nearest(Vector x, bool is_bfloat16) {
  if (!is_bfloat16) return x;
  const IntVector bits = (IntVector)x;
  return (Vector)((bits + 0x7FFF + ((bits >> 16) & 1)) & static_cast<int32_t>(0xFFFF0000));
}

// The scale and offset that round the block's 16 outputs best; see api.py: _best_affine.
static void BestAffine(const Rounding& rounding, const float* block, int64_t inputs,
                       float* best_scales, float* best_offsets) {
  for (int64_t part = 0; part < kParts; ++part, block += kLanes) {
    Vector highest = Load(block), lowest = highest;
    for (int64_t k = 1; k < inputs; ++k) {
      const Vector w = Load(block + k * kPanelOutputs);
      highest = Larger(w, highest);
      lowest = w < lowest ? w : lowest;
    }
    const Vector middle = 0.5f * highest + 0.5f * lowest, half_span = 0.5f * highest - 0.5f * lowest;
    Vector scale = {}, offset = {}, least_error = Broadcast(__builtin_inff());
    for (int64_t i = 0; i < rounding.num_steps; ++i) {
      const float step = rounding.steps[i];
      const Vector tried = half_span / (0.5f * step);
      const Vector start = middle - (0.5f * step + rounding.least) * tried;
      const Vector divisor = Divisor(tried);
      Vector error = {};
      for (int64_t k = 0; k < inputs; ++k) {
        const Vector ratio = (Load(block + k * kPanelOutputs) - start) / divisor;
        const Vector off = (Clip(RoundToEven(ratio), rounding.least, rounding.largest) - ratio) / step;
        error += off * off;
      }
      const IntVector is_better = error < least_error;
      scale = is_better ? tried : scale;
      offset = is_better ? start : offset;
      least_error = i == 0 ? error / rounding.found_again : is_better ? error : least_error;
    }
    Store(best_scales + part * kLanes, Nearest(scale, rounding.are_scales_bfloat16));
    Store(best_offsets + part * kLanes, Nearest(offset, rounding.are_scales_bfloat16));
  }
}

// Codes of a block's 16 outputs, [inputs, 16].
static void Codes(const Rounding& rounding, const float* block, int64_t inputs, const float* scales,
                  const float* offsets, int32_t* codes) {
  for (int64_t part = 0; part < kParts; ++part) {
    const Vector divisor = Divisor(Load(scales + part * kLanes));
    const Vector offset = Load(offsets + part * kLanes);
    for (int64_t k = 0; k < inputs; ++k) {
      const int64_t at = k * kPanelOutputs + part * kLanes;
      const Vector ratio =
          Clip((Load(block + at) - offset) / divisor, rounding.least, rounding.largest);
      const IntVector code = rounding.format == Format::kE4m3
                                 ? ToE4m3(ratio)
                                 : __builtin_convertvector(RoundToEven(ratio), IntVector);
      __builtin_memcpy(codes + at, &code, sizeof(code));
    }
  }
}

// Writes what a block's 16 outputs have, which bfloat16 holds if it is to, from index `at` on.
static void Keep(const float* of_outputs, bool is_bfloat16, void* kept, int64_t at) {
  for (int64_t i = 0; i < kPanelOutputs; ++i) {
    uint32_t word;
    __builtin_memcpy(&word, of_outputs + i, sizeof(word));
    if (is_bfloat16) {
      static_cast<uint16_t*>(kept)[at + i] = word >> 16;
    } else {
      static_cast<float*>(kept)[at + i] = of_outputs[i];
    }
  }
}

// See QuantizedKernels::quantize_panel.
static void QuantizePanel(const Rounding& rounding, const float* from, int64_t input_stride,
                          int64_t output_stride, int64_t inputs, uint8_t* values,
                          void* kept_scales, void* kept_offsets) {
  alignas(64) float block[kMostBlockInputs * kPanelOutputs];
  alignas(64) float scales[kPanelOutputs], offsets[kPanelOutputs] = {};
  alignas(64) int32_t codes[kMostBlockInputs * kPanelOutputs];
  const int bits = BitsOf(rounding.format), group = 32 / bits;
  for (int64_t begin = 0; begin < inputs; begin += rounding.block) {
    for (int64_t k = 0; k < rounding.block; ++k) {
      const float* row = from + (begin + k) * input_stride;
      for (int64_t i = 0; i < kPanelOutputs; ++i) block[k * kPanelOutputs + i] = row[i * output_stride];
    }
    if (rounding.is_affine) {
      BestAffine(rounding, block, rounding.block, scales, offsets);
    } else {
      BestScales(rounding, block, rounding.block, scales);
    }
    Codes(rounding, block, rounding.block, scales, offsets, codes);
    for (int64_t k = 0; k < rounding.block; k += group) {
      for (int64_t i = 0; i < kPanelOutputs; ++i) {
        uint32_t word = 0;
        for (int j = 0; j < group; ++j) {
          const uint32_t code = codes[(k + j) * kPanelOutputs + i] & ((1 << bits) - 1);
          word |= code << (bits == 8 || j < 4 ? 8 * j : 8 * (j - 4) + 4);
        }
        __builtin_memcpy(values, &word, sizeof(word));
        values += sizeof(word);
      }
    }
    const int64_t at = begin / rounding.block * kPanelOutputs;
    Keep(scales, rounding.are_scales_bfloat16, kept_scales, at);
    if (rounding.is_affine) Keep(offsets, rounding.are_scales_bfloat16, kept_offsets, at);
  }
}
