// One element of the sign-split EMA step. Equations: kssm_kernels/optim/sign_split_ema.py.
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
  S sign;   // -1: maximize
  S scale;  // gradients are divided by it
  S every;  // 1: zero gradients count too, 0: lazy
};

// state: parameter, positive and negative mean, temperature; those of an element that is not live stay as they are.
template <class V> struct SignSplitElement {
  V p, positive, negative, temperature;
};

// resistance: kappa, over the rms of P + N in consolidate. step: lr / cryo. Returns P + N.
template <int MODE, bool TEMPERATURE, class V>
KSSM_FN V sign_split_step(const SignSplitRule<Scalar<V>>& rule, V resistance, V step, V gradient, SignSplitElement<V>& x) {
  const V zero{}, one = splat<V>(Scalar<V>(1));
  const V g = gradient * splat<V>(rule.sign) / splat<V>(rule.scale);
  const V beta = splat<V>(rule.beta), fresh = splat<V>(rule.fresh);
  const V positive = beta * x.positive + fresh * (g > zero ? g : zero);
  const V negative = beta * x.negative + fresh * (g < zero ? -g : zero);
  const V opposite = g > zero ? negative : (g < zero ? positive : zero);
  const V size = positive + negative;
  V u, r{};
  V weight = size + splat<V>(rule.eps);
  weight = weight > zero ? weight : one;  // both means 0 and eps 0: r is 0, not 0/0
  if (MODE == kNormalized || TEMPERATURE) r = (positive - negative) / weight;
  if (MODE == kNormalized)
    u = r / (one + resistance * opposite / weight);
  else
    u = g / (one + resistance * opposite);
  // finite: inf - inf and NaN - NaN are NaN
  const auto live = (g - g == zero) & ((g != zero) | (splat<V>(rule.every) != zero));
  if (TEMPERATURE) {
    const V push = splat<V>(rule.heat) * (r < zero ? -r : r);
    V t = splat<V>(rule.cool) * x.temperature + push * (one - x.temperature);
    t = t > one ? one : t;  // not below 0: no term is
    x.temperature = live ? t : x.temperature;
    u = u * (splat<V>(rule.floor) + splat<V>(rule.range) * t);
  }
  const V moved = x.p - step * (u + splat<V>(rule.decay) * x.p);
  x.p = live ? moved : x.p;
  x.positive = live ? positive : x.positive;
  x.negative = live ? negative : x.negative;
  return x.positive + x.negative;
}

KSSM_NAMESPACE_END
