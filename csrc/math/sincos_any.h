// Sine and cosine of a few scalars of any finite size: the polynomial reduction, and the exact one for those past its
// reach. For code that keeps arrays in registers (csrc/cuda); vectors have csrc/cpu/trig.h.
#pragma once

#include "range_reduction.h"
#include "sincos.h"

KSSM_NAMESPACE_BEGIN

// x[i] where i is known at run time only: an address would send the array to memory.
template <class T, int K> KSSM_FN T pick(const T (&x)[K], int i) {
  T y = x[0];
  KSSM_UNROLL
  for (int k = 1; k < K; ++k) y = k == i ? x[k] : y;
  return y;
}
template <class T, int K> KSSM_FN void place(T (&x)[K], int i, T y) {
  KSSM_UNROLL
  for (int k = 0; k < K; ++k) x[k] = k == i ? y : x[k];
}

// Integers order like the magnitudes they encode; NaN counts as far, and the exact reduction returns it.
template <class T> KSSM_FN bool is_far(T x) { return (bits(x) & ~Trig<T>::sign_bit) > bits(Trig<T>::reach); }

// Four at a time, which is enough to fill a pipeline: more would hold more registers.
template <class T, int K> KSSM_FN void sincos_any(const T (&x)[K], T (&sin)[K], T (&cos)[K]) {
  constexpr int P = K < 4 ? K : 4;
  static_assert(K % P == 0, "whole groups");
  KSSM_UNROLL
  for (int first = 0; first < K; first += P) {
    T r[P];
    Int<T> q[P];
    bool far = false;
    KSSM_UNROLL
    for (int k = 0; k < P; ++k) {
      reduce(x[first + k], r[k], q[k]);
      far |= is_far(x[first + k]);
    }
    if (__builtin_expect(far, 0)) {
      KSSM_ROLLED
      for (int i = 0; i < P; ++i) {
        const T xi = pick(x, first + i);
        if (!is_far(xi)) continue;
        const Reduced exact = reduce_exact(static_cast<double>(xi));
        place(r, i, static_cast<T>(exact.r));
        place(q, i, static_cast<Int<T>>(exact.q));
      }
    }
    KSSM_UNROLL
    for (int k = 0; k < P; ++k) sincos_reduced(r[k], q[k], sin[first + k], cos[first + k]);
  }
}

KSSM_NAMESPACE_END
