// Coupling strength from the ten algebraic parameters a..j of the bistable bank, and its adjoint.
// Equations: kssm_kernels/ops/bistable_coupling/__init__.py.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

template <class T> struct Bistable {
  T raw, den, u, sigmoid, delta;
};

// exponential: e^x of the platform, so that this header needs no library
template <class T, class Exp> KSSM_FN Bistable<T> bistable(const T* p, T low, T high, Exp exponential) {
  Bistable<T> y;
  y.den = p[0] * p[6] - p[2] * p[4] + T(1e-6);
  y.raw = (p[3] * p[6] - p[2] * p[7]) / y.den;
  y.delta = p[1] * p[6] - p[2] * p[5];
  y.u = y.raw < low ? low : y.raw > high ? high : y.raw;  // NaN passes, as through torch.clamp
  y.sigmoid = T(1) / (T(1) + exponential(-y.u));
  return y;
}

template <class T>
KSSM_FN void bistable_adjoint(const T* p, const Bistable<T>& y, T low, T high, T g_k, T g_u, T g_delta, T* g) {
  const bool inside = y.raw >= low && y.raw <= high;
  const T r = inside ? g_u + T(2) * g_k * y.sigmoid * (T(1) - y.sigmoid) : T(0);
  const T num = r / y.den, den = -r * y.raw / y.den;
  g[0] = den * p[6];
  g[1] = g_delta * p[6];
  g[2] = -g_delta * p[5] - num * p[7] - den * p[4];
  g[3] = num * p[6];
  g[4] = -den * p[2];
  g[5] = -g_delta * p[2];
  g[6] = g_delta * p[1] + num * p[3] + den * p[0];
  g[7] = -num * p[2];
  g[8] = T(0);
  g[9] = T(0);
}

KSSM_NAMESPACE_END
