// Counter-based standard normal noise, bit for bit that of kssm_kernels/noise.py: Philox 4x32-10 (J. Salmon et al.,
// SC11) and the Box-Muller transform in float32 additions, multiplications and square roots, with no fused multiply-add.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

// low 32 bits of a times b, all 64 bits of it; csrc/cpu/simd.h has it for vectors of 64-bit lanes
KSSM_FN uint64_t multiply_low(uint64_t a, uint32_t b) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b; }

// Words live in the low halves of 64-bit numbers U, where a product leaves them; the high halves hold anything.
template <class U> KSSM_FN void philox_4x32(U (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const U p0 = multiply_low(c[0], 0xD2511F53u), p1 = multiply_low(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ static_cast<uint64_t>(k0);
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ static_cast<uint64_t>(k1);
    c[3] = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Oscillator j of a row takes word (j mod 32) div 8 of block 8 (j div 32) + j mod 8.
constexpr int kNoiseGroup = 32, kNoiseLanes = 8;

// Inputs are the words' useful bits as signed integers of V's shape, all below 2^24:
// top = word0 >> 8, angle = (word1 >> 6) & 0xffffff, quadrant = word1 >> 30. Convert: Int<V> -> V, exact.
template <class V, class Convert>
KSSM_FN void box_muller(Int<V> top, Int<V> angle, Int<V> quadrant, Convert to_float, V& first, V& second) {
  const V v = to_float(top + 1);
  const Int<V> shifted = bits(v) - 0x3F3504F3;  // the bits of 1/sqrt 2, the lower end of the mantissa
  const V f = from_bits<V>((shifted & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
  V z = f * f;
  V p = splat<V>(-0.0786027368843f);
  p = p * f + 0.128814479574f;
  p = p * f + -0.131283989162f;
  p = p * f + 0.141812078497f;
  p = p * f + -0.166245962172f;
  p = p * f + 0.200022862428f;
  p = p * f + -0.250008089999f;
  p = p * f + 0.333333167252f;
  const V log_mantissa = (f - 0.5f * z) + (z * f) * p;
  V minus_log = to_float(24 - (shifted >> 23)) * 0.69314718055994530942f - log_mantissa;
  minus_log = minus_log > 0.0f ? minus_log : V{};
  const V radius = square_root(2.0f * minus_log);

  const V x = to_float(angle - 0x800000) * 0x1.921fb6p-24f;  // pi/2 / 2^24
  z = x * x;
  V s = splat<V>(-0.00019509068730541130098f);
  s = s * z + 0.0083321185616159788903f;
  s = s * z + -0.16666654024093863352f;
  s = x + (x * z) * s;
  V c = splat<V>(0.000024429218880558318696f);
  c = c * z + -0.0013887288990100313331f;
  c = c * z + 0.041666645312127270637f;
  c = (1.0f - 0.5f * z) + (z * z) * c;
  const Int<V> swap_sign = quadrant << 31, sine_sign = quadrant << 30;
  const auto odd = swap_sign < 0;
  const V a = odd ? s : c, b = odd ? c : s;
  first = radius * from_bits<V>(bits(a) ^ ((sine_sign ^ swap_sign) & INT32_MIN));
  second = radius * from_bits<V>(bits(b) ^ (sine_sign & INT32_MIN));
}

KSSM_NAMESPACE_END
