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

KSSM_NAMESPACE_END
