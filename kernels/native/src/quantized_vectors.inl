// Stored weights of a panel as vectors of floats; included inside an instruction set's namespace,
// behind vector.inl.

// Vectors that hold a panel's 16 outputs.
constexpr int64_t kParts = kPanelOutputs / kLanes;
// Bytes of one input group of a panel: 16 outputs of 4 bytes.
constexpr int64_t kGroupBytes = 4 * kPanelOutputs;

// Vectors of a line of the cache, and bytes of weights that are asked for ahead: while rows meet one
// line, memory would rest.
constexpr int64_t kPartsOfLine = 64 / sizeof(IntVector);
constexpr int64_t kAhead = 2048;

MOESAIC_INLINE IntVector LoadInts(const void* from) {
  IntVector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

MOESAIC_INLINE Vector ToFloat(IntVector vector) { return __builtin_convertvector(vector, Vector); }

// What scales or offsets have for a part of a panel's outputs and inputs of one block.
MOESAIC_INLINE Vector OfBlock(const QuantizedMatrix& w, const void* from, int64_t panel,
                              int64_t block, int64_t part) {
  const int64_t index = (panel * (w.inputs / w.block) + block) * kPanelOutputs + part * kLanes;
  if (!w.are_scales_bfloat16) return Load(static_cast<const float*>(from) + index);
  return LoadHalves(static_cast<const uint16_t*>(from) + index);
}

MOESAIC_INLINE Vector Scales(const QuantizedMatrix& w, int64_t panel, int64_t block, int64_t part) {
  return OfBlock(w, w.scales, panel, block, part);
}

// Floats of e4m3 codes below 256. Numbers below 2^-6 have no leading one, and the code of what is
// not a number is no greater number here.
MOESAIC_INLINE Vector FromE4m3(IntVector code) {
  const IntVector magnitude = code & 0x7F;
  const IntVector small = (IntVector)(ToFloat(magnitude) * 0x1p-9f);
  IntVector bits = (magnitude << 20) + (120 << 23);  // the exponents' biases are 7 and 127
  bits = magnitude < 8 ? small : bits;
  bits = magnitude == 0x7F ? IntVector{} + 0x7FC00000 : bits;
  return (Vector)(bits | ((code & 0x80) << 24));
}

// Of each lane's four bytes, the weight of input `index` of the group: byte `index` for 8 bits,
// nibble `index` in the panel's order for 4.
template <Format kFormat>
MOESAIC_INLINE Vector Weight(IntVector group, int index) {
  if (kFormat == Format::kE4m3) return FromE4m3((group >> (8 * index)) & 0xFF);
  constexpr int kBits = BitsOf(kFormat);
  const int top = kBits == 8 ? 24 - 8 * index : index < 4 ? 28 - 8 * index : 24 - 8 * (index - 4);
  return ToFloat((group << top) >> (32 - kBits));
}
