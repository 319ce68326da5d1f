// Sine and cosine of one number type, branch-free: reduce to [-pi/4, pi/4], two polynomials, swap and sign by quadrant.
// Absolute error below 1 ulp of 1 for |x| <= Trig::reach; past it the caller reduces by range_reduction.h.
// Coefficients: minimax fits on |x| <= pi/4 + 0.01 (the margin is the quotient's rounding at the end of the reach).
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

template <class T> struct Trig;

// Returned by a function: device code cannot read a static array of the host.
template <class T, int PARTS, int DEGREE> struct TrigTable {
  T half_pi[PARTS], sin[DEGREE], cos[DEGREE];
};

template <> struct Trig<float> {
  static constexpr float two_over_pi = 0.63661977f;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
#if KSSM_HAS_FMA
  static constexpr float reach = 131072.0f;
  static constexpr int parts = 2;  // what they leave of pi/2 is 2e-15, times a quotient below 2^17
#else
  static constexpr float reach = 12000.0f;  // quotient < 2^13: its product with 11 bits is exact
  static constexpr int parts = 4;
#endif
  static constexpr int degree = 3;
  KSSM_FN static constexpr TrigTable<float, parts, degree> table() {
    return {
#if KSSM_HAS_FMA
        {0x1.921fb6p+0f, -0x1.777a5cp-25f},
#else
        {0x1.92p+0f, 0x1.fb4p-12f, 0x1.444p-24f, 0x1.68c234p-39f},
#endif
        {-0.16666654024093863352f, 0.0083321185616159788903f, -0.00019509068730541130098f},
        {0.041666645312127270637f, -0.0013887288990100313331f, 0.000024429218880558318696f}};
  }
  static constexpr int sign_shift = 30;
  static constexpr int32_t sign_bit = INT32_MIN;
};

template <> struct Trig<double> {
  static constexpr double two_over_pi = 0.63661977236758134308;
  static constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
#if KSSM_HAS_FMA
  static constexpr double reach = 268435456.0;  // 2^28
  static constexpr int parts = 2;
#else
  static constexpr double reach = 1e6;  // quotient < 2^20: its product with 33 bits is exact
  static constexpr int parts = 4;
#endif
  static constexpr int degree = 6;
  KSSM_FN static constexpr TrigTable<double, parts, degree> table() {
    return {
#if KSSM_HAS_FMA
        {0x1.921fb54442d18p+0, 0x1.1a62633145c07p-54},
#else
        {0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2ep-69, 0x1.b839a252p-104},
#endif
        {-0.16666666666666626374, 0.0083333333333209506544, -0.00019841269828596401688, 2.7557313259404990664e-6,
         -2.5050688704350341726e-8, 1.5892685444302082798e-10},
        {0.041666666666666588587, -0.0013888888888872155326, 0.000024801587288207594796, -2.7557313972612289074e-7,
         2.0875670270241169517e-9, -1.1356839400549403469e-11}};
  }
  static constexpr int sign_shift = 62;
  static constexpr int64_t sign_bit = INT64_MIN;
};

// x = q pi/2 + r; the quadrant is q's two lowest bits.
template <class V> KSSM_FN void reduce(V x, V& r, Int<V>& q) {
  using P = Trig<Scalar<V>>;
  const V shifted = fma(x, splat<V>(P::two_over_pi), splat<V>(P::magic));
  const V k = shifted - splat<V>(P::magic);
  q = bits(shifted);
  r = x;
  constexpr auto table = P::table();
  KSSM_UNROLL
  for (int i = 0; i < P::parts; ++i) r = fma(k, splat<V>(-table.half_pi[i]), r);
}

template <class V, int DEGREE> KSSM_FN V horner(const Scalar<V> (&coefficients)[DEGREE], V x) {
  V y = splat<V>(coefficients[DEGREE - 1]);
  KSSM_UNROLL
  for (int i = DEGREE - 2; i >= 0; --i) y = fma(y, x, splat<V>(coefficients[i]));
  return y;
}

// |r| <= pi/4
template <class V> KSSM_FN void sincos_small(V r, V& s, V& c) {
  constexpr auto table = Trig<Scalar<V>>::table();
  const V z = r * r;
  s = fma(r * z, horner<V>(table.sin, z), r);
  c = fma(z * z, horner<V>(table.cos, z), fma(z, splat<V>(Scalar<V>(-0.5)), splat<V>(Scalar<V>(1))));
}

template <class V> KSSM_FN void sincos_reduced(V r, Int<V> q, V& sin, V& cos) {
  using P = Trig<Scalar<V>>;
  V s, c;
  sincos_small(r, s, c);
  // the quotient's lowest bit swaps; its second is sine's sign, and the two bits' exclusive or is cosine's
  const Int<V> swap_sign = q << (P::sign_shift + 1), sine_sign = q << P::sign_shift;
  const auto odd = swap_sign < 0;
  const V a = odd ? c : s, b = odd ? s : c;
  sin = from_bits<V>(bits(a) ^ (sine_sign & P::sign_bit));
  cos = from_bits<V>(bits(b) ^ ((sine_sign ^ swap_sign) & P::sign_bit));
}

KSSM_NAMESPACE_END
