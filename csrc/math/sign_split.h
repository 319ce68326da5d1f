// One element of the sign-split EMA step. Equations: kssm_kernels/optim/sign_split/__init__.py.
// No fused multiply-add: every backend, pure torch included, then gives the same bits.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

enum SignSplitMode { kPaper = 0, kNormalized = 1, kConsolidate = 2 };

// What all elements of a call share. S: float or double; differences from 1 are taken in double and rounded once.
template <class S> struct SignSplitRule {
  S beta, fresh;  // b, 1 - b
  S kappa, eps, decay;
  S cool, heat, floor, range;  // range: 1 - floor
  S scale;                     // gradients are divided by it; negative: maximize
  bool scaled, padded, decays, lazy;  // scale is not 1, eps and decay are not 0; zero gradients leave their element alone
};

// Unsigned integers of V's shape, and the bits of infinity.
template <class V> struct Unsigned;
template <> struct Unsigned<float> {
  using Type = uint32_t;
  static constexpr uint32_t infinity = 0x7f800000u;
};
template <> struct Unsigned<double> {
  using Type = uint64_t;
  static constexpr uint64_t infinity = 0x7ff0000000000000u;
};

// |g| < inf and, if lazy, g != 0: 0 (lazy: 1) <= bits of |g| < those of infinity, in one comparison
template <class V> KSSM_FN auto is_live(V g, bool lazy) {
  using U = typename Unsigned<V>::Type;
  using Word = typename Unsigned<Scalar<V>>::Type;
  const Word from = lazy ? 1 : 0, infinity = Unsigned<Scalar<V>>::infinity;
  U magnitude;
  __builtin_memcpy(&magnitude, &g, sizeof(V));
  magnitude = (magnitude & (~Word(0) >> 1)) - from;
  return magnitude < U{} + (infinity - from);
}

// Those of an element that is not live stay as they are.
template <class V> struct SignSplitElement {
  V p, positive, negative, temperature;
};

// x > y ? x : y and x < y ? x : y, NaN included: what the vector units of csrc/cpu have in one instruction
KSSM_FN float larger(float x, float y) { return x > y ? x : y; }
KSSM_FN double larger(double x, double y) { return x > y ? x : y; }
KSSM_FN float smaller(float x, float y) { return x < y ? x : y; }
KSSM_FN double smaller(double x, double y) { return x < y ? x : y; }

// resistance: kappa, over the rms of P + N in consolidate. step: lr / cryo. Returns P + N.
// The branches are on what all elements share: they save arithmetic, which bounds the CPU kernel beside its memory.
template <int MODE, bool TEMPERATURE, class V>
KSSM_FN V sign_split_step(const SignSplitRule<Scalar<V>>& rule, V resistance, V step, V g, SignSplitElement<V>& x) {
  using S = Scalar<V>;
  const V zero{}, one = splat<V>(S(1));
  if (rule.scaled) g = g / splat<V>(rule.scale);
  const V beta = splat<V>(rule.beta), part = splat<V>(rule.fresh) * g;
  const V positive = beta * x.positive + larger(part, zero);
  const V negative = beta * x.negative - smaller(part, zero);
  V opposite = g < zero ? positive : negative;
  if (!rule.lazy) opposite = g != zero ? opposite : zero;
  const V difference = positive - negative;
  V weight = positive + negative;
  if (MODE == kNormalized || TEMPERATURE) {
    if (rule.padded)
      weight = weight + splat<V>(rule.eps);
    else
      weight = weight > zero ? weight : one;  // both means 0: r is 0, not 0/0
  }
  V u;
  if (MODE == kNormalized)
    u = difference / (weight + resistance * opposite);  // r / (1 + kappa D / weight) in one division
  else
    u = g / (one + resistance * opposite);
  const auto live = is_live(g, rule.lazy);
  if (TEMPERATURE) {
    const V r = difference / weight, push = splat<V>(rule.heat) * (r < zero ? -r : r);
    const V t = smaller(splat<V>(rule.cool) * x.temperature + push * (one - x.temperature), one);  // no term is negative
    x.temperature = live ? t : x.temperature;
    u = u * (splat<V>(rule.floor) + splat<V>(rule.range) * t);
  }
  if (rule.decays) u = u + splat<V>(rule.decay) * x.p;
  x.p = live ? x.p - step * u : x.p;
  x.positive = live ? positive : x.positive;
  x.negative = live ? negative : x.negative;
  return x.positive + x.negative;
}

KSSM_NAMESPACE_END
