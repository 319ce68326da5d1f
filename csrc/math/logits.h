// Gates of logits: exp(x) of x <= 0 by ln 2 and a polynomial, sigmoid and its complement, log(1 + exp(x)). No finite
// logit overflows; relative errors are a few ulp. NaN passes.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

template <class T> struct Exponential;

template <> struct Exponential<float> {
  static constexpr float lowest = -87.0f;  // below it exp is no normal number, and 0 here
  static constexpr float magic = 12582912.0f;
  static constexpr int degree = 7, log_degree = 8;  // Taylor terms: what is left out is below 1e-8
  static constexpr int32_t one = 0x3f800000, last_exponent_bit = 1 << 23, sign = INT32_MIN;
};
template <> struct Exponential<double> {
  static constexpr double lowest = -708.0;
  static constexpr double magic = 6755399441055744.0;
  static constexpr int degree = 13, log_degree = 17;  // below 1e-17
  static constexpr int64_t one = INT64_C(0x3ff0000000000000), last_exponent_bit = INT64_C(1) << 52, sign = INT64_MIN;
};

template <class V> KSSM_FN V number(double x) { return splat<V>(static_cast<Scalar<V>>(x)); }

template <class V> KSSM_FN V absolute(V x) {
  return from_bits<V>(bits(x) & ~Exponential<Scalar<V>>::sign);
}
template <class V> KSSM_FN V larger(V x, V y) { return x > y ? x : y; }  // y where x is NaN

template <class V> KSSM_FN V exp_of_negative(V x) {
  using P = Exponential<Scalar<V>>;
  const V lowest = splat<V>(P::lowest), magic = splat<V>(P::magic);
  const V shifted = fma(x > lowest ? x : lowest, number<V>(1.4426950408889634), magic), n = shifted - magic;
  // ln 2 in two parts; the first has so few bits that its product with n is exact
  V r = fma(n, number<V>(sizeof(Scalar<V>) == 4 ? -0.693145751953125 : -6.93147180369123816490e-01), x);
  r = fma(n, number<V>(sizeof(Scalar<V>) == 4 ? -1.42860682030941723e-6 : -1.90821492927058770e-10), r);
  V y = splat<V>(Scalar<V>(1));
  KSSM_UNROLL
  for (int k = P::degree; k >= 1; --k) y = fma(y * number<V>(1.0 / k), r, splat<V>(Scalar<V>(1)));
  const V scale = from_bits<V>((bits(shifted) - bits(magic)) * P::last_exponent_bit + P::one);
  return x < lowest ? V{} : y * scale;
}

template <class V> struct Gate {
  V open, shut;  // sigmoid(x), 1 - sigmoid(x), each to its own last bits
};

template <class V> KSSM_FN Gate<V> sigmoid(V x) {
  const V e = exp_of_negative(-absolute(x)), large = splat<V>(Scalar<V>(1)) / (splat<V>(Scalar<V>(1)) + e);
  const V small = e * large;
  const auto positive = x >= V{};
  return {positive ? large : small, positive ? small : large};
}

// log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|);  log(1 + e) = 2 artanh(e / (2 + e))
template <class V> KSSM_FN V softplus(V x) {
  using P = Exponential<Scalar<V>>;
  const V e = exp_of_negative(-absolute(x)), t = e / (number<V>(2.0) + e), square = t * t;
  V y = number<V>(1.0 / (2 * P::log_degree + 1));
  KSSM_UNROLL
  for (int k = P::log_degree - 1; k >= 0; --k) y = fma(y, square, number<V>(1.0 / (2 * k + 1)));
  const V positive = x < V{} ? V{} : x;
  return fma(t + t, y, positive);
}

KSSM_NAMESPACE_END
