// Exponentials of vectors; included inside an instruction set's namespace, behind vector.inl.

// exp(x) for x <= 88, within 2 units in the last place; exactly 0 below -87, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) by its Taylor polynomial of degree 6, whose first
// missing term is below 2^-23. Two parts of ln 2 keep r exact (Cody and Waite, 1980).
MOESAIC_INLINE Vector Exp(Vector x) {
  const Vector clipped = x < -87.0f ? Broadcast(-87.0f) : x;
  const Vector shifted = clipped * 1.44269504f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  const Vector r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector sum = Broadcast(1.0f / 720);
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const IntVector exponent = __builtin_convertvector(n, IntVector) << 23;
  const Vector result = (Vector)((IntVector)sum + exponent);
  return x < -87.0f ? Vector{} : result;
}
