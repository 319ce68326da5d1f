// One mean-field step of one oscillator and its adjoint; C + iS is the mean field, (ca, sa) = cos, sin of theta + alpha.
//
//   p = Im(Z e^{-i(theta+alpha)}) = S ca - C sa,  q = Re(same) = S sa + C ca
//   theta' = theta + dt (omega + K p) - delta xi
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

template <class V> KSSM_FN V pull(V mean_cos, V mean_sin, V ca, V sa) { return fma(mean_sin, ca, -(mean_cos * sa)); }
template <class V> KSSM_FN V align(V mean_cos, V mean_sin, V ca, V sa) { return fma(mean_sin, sa, mean_cos * ca); }

// What gradient g at theta' leaves at theta through the oscillator itself; the mean field's share is added by
// mean_field_adjoint once gC = -dt sum g K sa and gS = dt sum g K ca are known (both divided by N here).
template <class V> KSSM_FN V own_adjoint(V g, V dt_g_k, V q) { return fma(-dt_g_k, q, g); }
template <class V> KSSM_FN V mean_field_adjoint(V g, V cos, V sin, V g_mean_cos, V g_mean_sin) {
  return fma(g_mean_sin, cos, fma(-g_mean_cos, sin, g));
}

// A call of many steps keeps a phase as x + moved (FOLD in kssm_kernels/ops/kuramoto/_update.py says why). fold puts `moved` into
// x, and what rounding cuts off into `moved`; with `wrap` it takes whole turns off x. TURN has 8 bits: its multiples are
// exact, and so is what they leave of x.
constexpr int kFold = 8;        // FOLD: steps between folds
constexpr int kPlain = 16;      // PLAIN: calls of up to this many steps add each step to the phase itself
constexpr int kUnwrapped = 256; // UNWRAPPED: calls of up to this many steps, and those in double, wrap nothing
constexpr double kTurn = 6.28125, kRest = 0.0019353071795864769;  // TURN + REST = 2 pi
constexpr double kCountable = 1e5;                                // COUNTABLE

template <class V> KSSM_FN void fold(V& x, V& moved, bool wrap) {
  using S = Scalar<V>;
  V y = moved, from = x;
  if (wrap) {
    const V magic = splat<V>(sizeof(S) == 8 ? S(0x1.8p52) : S(0x1.8p23));  // adding it rounds to an integer
    const V turns = (x * splat<V>(S(0.15915494309189533577)) + magic) - magic;
    from = x - turns * splat<V>(S(kTurn));
    y = y - turns * splat<V>(S(kRest));
  }
  const V sum = from + y, part = sum - from;
  moved = (from - (sum - part)) + (y - part);
  x = sum;
}

KSSM_NAMESPACE_END
