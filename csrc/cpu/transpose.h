// A square of vectors transposed in registers: rows of memory to lanes, and back.
#pragma once

#include "simd.h"

KSSM_NAMESPACE_BEGIN

// The lower, or upper, halves of a and b in turn: a0 b0 a1 b1 ..
#if defined(__clang__) || __GNUC__ >= 12
template <bool UPPER, class V> KSSM_FN V interleaved(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(Scalar<V>);
  if constexpr (lanes == 2) {
    return UPPER ? __builtin_shufflevector(a, b, 1, 3) : __builtin_shufflevector(a, b, 0, 2);
  } else if constexpr (lanes == 4) {
    return UPPER ? __builtin_shufflevector(a, b, 2, 6, 3, 7) : __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else if constexpr (lanes == 8) {
    return UPPER ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                 : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else {
    static_assert(lanes == 16, "a vector of 2 to 16 lanes");
    return UPPER ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                 : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
}
#else
template <bool UPPER, class V> KSSM_FN V interleaved(V a, V b) {
  constexpr int half = sizeof(V) / sizeof(Scalar<V>) / 2;
  V y;
  for (int i = 0; i < half; ++i) {
    y[2 * i] = a[i + UPPER * half];
    y[2 * i + 1] = b[i + UPPER * half];
  }
  return y;
}
#endif

// As many vectors as a vector has lanes. One shuffle of the whole square rotates the bits of an element's place (row,
// then lane) by one; as many as a lane's number has bits exchange row and lane.
template <class V> KSSM_FN void transpose(V (&x)[sizeof(V) / sizeof(Scalar<V>)]) {
  constexpr int lanes = sizeof(V) / sizeof(Scalar<V>);
#pragma GCC unroll 4
  for (int stage = 1; stage < lanes; stage *= 2) {
    V y[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      y[2 * i] = interleaved<false>(x[i], x[i + lanes / 2]);
      y[2 * i + 1] = interleaved<true>(x[i], x[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) x[i] = y[i];
  }
}

// columns[j], lane i = row(i)[j], j < count; columns and rows may be touched up to the next whole vector.
template <class T, class Rows> KSSM_FN void rows_to_lanes(const Rows& row, int64_t count, Vec<T>* columns) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < count; j += W) {
    Vec<T> x[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = load(row(i) + j);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) columns[j + i] = x[i];
  }
}

// row(i)[j] = columns[j], lane i; columns and rows are touched up to the next whole vector.
template <class T, class Rows> KSSM_FN void lanes_to_rows(const Vec<T>* columns, int64_t count, const Rows& row) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < count; j += W) {
    Vec<T> x[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = columns[j + i];
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(row(i) + j, x[i]);
  }
}

KSSM_NAMESPACE_END
