// One step of the oscillator scan and its adjoint, for one number type. Equations and names:
// kssm_kernels/ops/oscillator_scan/__init__.py. gX stands for dL/dRe X + i dL/dIm X.
#pragma once

#include "logits.h"

KSSM_NAMESPACE_BEGIN

template <class V> struct Complex {
  V re, im;
};

template <class V> KSSM_FN Complex<V> operator+(Complex<V> a, Complex<V> b) { return {a.re + b.re, a.im + b.im}; }
template <class V> KSSM_FN Complex<V> operator*(V x, Complex<V> a) { return {x * a.re, x * a.im}; }
template <class V> KSSM_FN Complex<V> operator*(Complex<V> a, Complex<V> b) {
  return {fma(a.re, b.re, -(a.im * b.im)), fma(a.re, b.im, a.im * b.re)};
}
// a conj(b), and Re(conj(a) b)
template <class V> KSSM_FN Complex<V> times_conjugate(Complex<V> a, Complex<V> b) {
  return {fma(a.re, b.re, a.im * b.im), fma(a.im, b.re, -(a.re * b.im))};
}
template <class V> KSSM_FN V real_of(Complex<V> a, Complex<V> b) { return fma(a.re, b.re, a.im * b.im); }

// ---- what a step takes from its inputs alone ----

template <class V> struct WriteGates {
  V open, shut, decay;  // g, 1 - g, 1 - (1 - 1e-6) g^2
  Complex<V> d, lam;
};

// keep: 1 - f, or 1 - K with a tied leak, or 1; sin, cos: of the phase's advance
template <bool MOEBIUS, class V> KSSM_FN WriteGates<V> write_gates(V p, V q, V gate, V sin, V cos, V keep) {
  const Gate<V> g = sigmoid(gate);
  WriteGates<V> y;
  y.open = g.open;
  y.shut = g.shut;
  y.decay = fma(g.shut, splat<V>(Scalar<V>(1)) + g.open, number<V>(1e-6) * (g.open * g.open));
  y.d = {g.open * p, g.open * q};
  const V size = (MOEBIUS ? g.shut : square_root(y.decay)) * keep;
  y.lam = {size * cos, size * sin};
  return y;
}

// ---- the step ----

template <class V> struct Squashed {
  Complex<V> u;  // z / sqrt(1 + |z|^2)
  V factor;

  KSSM_FN Complex<V> adjoint(Complex<V> g) const {
    const V inward = real_of(u, g);
    return {factor * fma(-u.re, inward, g.re), factor * fma(-u.im, inward, g.im)};
  }
};

template <class V> KSSM_FN Squashed<V> squash(Complex<V> z) {
  const V one = splat<V>(Scalar<V>(1)), most = larger(absolute(z.re), absolute(z.im));
  V r = one / square_root(fma(z.re, z.re, fma(z.im, z.im, one)));
  const auto large = most > number<V>(0x1p60);  // whose square may overflow
  if (__builtin_expect(any(large), 0)) {
    const V limit = number<V>(0x1p126), scale = one / (most > limit ? limit : most);  // a normal number
    const V a = z.re * scale, b = z.im * scale;
    r = large ? scale / square_root(fma(a, a, b * b)) : r;
  }
  return {{z.re * r, z.im * r}, r};
}

// v, what the field and the readout see of a state
template <bool MOEBIUS, class V> KSSM_FN Complex<V> seen(Complex<V> z) {
  if constexpr (MOEBIUS) return z;
  else return squash(z).u;
}

template <class V> struct Moebius {
  Squashed<V> w;
  Complex<V> c, n;
  V per_size;  // 1 / |c|^2, whose |c|^2 is not below its own rounding error
};

template <class V> KSSM_FN Moebius<V> moebius_parts(Complex<V> s, Complex<V> force) {
  const V limit = number<V>(0x1p126);  // sums of two finite forces may be infinite
  const auto bounded = [&](V x) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
  };
  Moebius<V> m;
  m.w = squash(Complex<V>{bounded(force.re), bounded(force.im)});
  const Complex<V> turned = times_conjugate(s, m.w.u);
  m.c = {splat<V>(Scalar<V>(1)) + turned.re, turned.im};
  m.n = s + m.w.u;
  const V square = fma(m.c.re, m.c.re, m.c.im * m.c.im);
  const V floor = number<V>(sizeof(Scalar<V>) == 4 ? 0x1p-46 : 0x1p-104);
  m.per_size = splat<V>(Scalar<V>(1)) / (square < floor ? floor : square);
  return m;
}

// Scaled back to radius 1 where |z|^2 is above `limit`.
template <class V> KSSM_FN Complex<V> inside_disc(Complex<V> z, V limit) {
  const V square = real_of(z, z);
  const auto outside = square > limit;
  if (__builtin_expect(any(outside), 0)) {
    const V back = splat<V>(Scalar<V>(1)) / square_root(square);
    z = {outside ? z.re * back : z.re, outside ? z.im * back : z.im};
  }
  return z;
}

// The state after a step; s = lam z(t-1), force = d + field
template <bool MOEBIUS, class V> KSSM_FN Complex<V> step(Complex<V> s, Complex<V> force) {
  if constexpr (!MOEBIUS) {
    return s + force;
  } else {
    const Moebius<V> m = moebius_parts(s, force);
    return inside_disc(m.per_size * times_conjugate(m.n, m.c), splat<V>(Scalar<V>(1)));
  }
}

// The initial state as the first step takes it: for moebius inside of the disc. States of an earlier call pass as they
// are.
template <bool MOEBIUS, class V> KSSM_FN Complex<V> start(Complex<V> z) {
  if constexpr (!MOEBIUS) {
    return z;
  } else {
    const V eps = number<V>(sizeof(Scalar<V>) == 4 ? 0x1p-23 : 0x1p-52), one = splat<V>(Scalar<V>(1));
    const V size = larger(absolute(z.re), absolute(z.im));  // whose square may overflow
    const auto far = size > one + number<V>(8.0) * eps;
    z = {far ? z.re / size : z.re, far ? z.im / size : z.im};
    return inside_disc(z, one + number<V>(16.0) * eps);
  }
}

// ---- its adjoint ----

template <class V> struct StepAdjoint {
  Complex<V> s, force;
};

template <bool MOEBIUS, class V>
KSSM_FN StepAdjoint<V> step_adjoint(Complex<V> s, Complex<V> force, Complex<V> after, Complex<V> g) {
  if constexpr (!MOEBIUS) {
    return {g, g};
  } else {
    const Moebius<V> m = moebius_parts(s, force);
    const Complex<V> gn = g * (m.per_size * m.c), x = times_conjugate(gn, after), gc = {-x.re, -x.im};
    const Complex<V> gw = gn + Complex<V>{gc.re, -gc.im} * s;
    return {gn + gc * m.w.u, m.w.adjoint(gw)};
  }
}

// Gradients of a step's inputs from those of s and d.
template <class V> struct InputGradients {
  V p, q, gate, phase, rho;  // rho: of log |lam|
};

template <bool MOEBIUS, class V>
KSSM_FN InputGradients<V> input_gradients(const WriteGates<V>& gates, Complex<V> s, StepAdjoint<V> g) {
  InputGradients<V> y;
  y.rho = real_of(s, g.s);
  y.phase = fma(s.re, g.s.im, -(s.im * g.s.re));
  y.p = gates.open * g.force.re;
  y.q = gates.open * g.force.im;
  const V lost = MOEBIUS ? gates.open * y.rho
                         : number<V>(1 - 1e-6) * (gates.open * gates.open) * (gates.shut * y.rho) / gates.decay;
  y.gate = fma(gates.shut, real_of(gates.d, g.force), -lost);
  return y;
}

// Of v: (1/N) sum_n n conj(v)^(n-1) gZ_n; g(n): gZ_n / N
template <class V, class F> KSSM_FN Complex<V> readout_adjoint(Complex<V> v, int64_t harmonics, const F& g) {
  Complex<V> total = {V{}, V{}};
  for (int64_t n = harmonics; n >= 1; --n) total = times_conjugate(total, v) + number<V>(static_cast<double>(n)) * g(n);
  return total;
}

KSSM_NAMESPACE_END
