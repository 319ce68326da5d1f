// sincos for vectors of any finite phases: the polynomial reduction, or lane by lane the exact one where a phase is
// past its reach.
#pragma once

#include "simd.h"

#include "../math/range_reduction.h"
#include "../math/sincos.h"

KSSM_NAMESPACE_BEGIN

template <class T> __attribute__((noinline)) inline void reduce_far_lanes(const T* x, T* r, void* quadrants) {
  using I = Int<T>;
  I* q = static_cast<I*>(quadrants);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (__builtin_fabs(static_cast<double>(x[i])) <= static_cast<double>(Trig<T>::reach)) continue;
    const Reduced exact = reduce_exact(static_cast<double>(x[i]));
    r[i] = static_cast<T>(exact.r);
    q[i] = static_cast<I>(exact.q);
  }
}

template <class T, int P> KSSM_FN void sincos(const Vec<T> (&x)[P], Vec<T> (&sin)[P], Vec<T> (&cos)[P]) {
  using V = Vec<T>;
  V r[P];
  Int<V> q[P], far{};
  for (int p = 0; p < P; ++p) {
    reduce(x[p], r[p], q[p]);
    // integers order like the magnitudes they encode; NaN counts as far, and the exact reduction returns it
    far |= (Int<V>)((bits(x[p]) & ~Trig<T>::sign_bit) > bits(splat<V>(Trig<T>::reach)));
  }
  if (__builtin_expect(any(far), 0)) {
    for (int p = 0; p < P; ++p) {
      T xs[kLanes<T>], rs[kLanes<T>];
      Int<T> qs[kLanes<T>];
      store(xs, x[p]);
      store(rs, r[p]);
      __builtin_memcpy(qs, &q[p], sizeof(qs));
      reduce_far_lanes(xs, rs, qs);
      r[p] = load<T>(rs);
      __builtin_memcpy(&q[p], qs, sizeof(qs));
    }
  }
  for (int p = 0; p < P; ++p) sincos_reduced(r[p], q[p], sin[p], cos[p]);
}

KSSM_NAMESPACE_END
