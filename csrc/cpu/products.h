// Small matrix products with the weights in cache: a few rows at once, columns in lanes, sums in registers.
#pragma once

#include "memory.h"

KSSM_NAMESPACE_BEGIN

namespace products {

constexpr int kRegisters = kBytes == 64 ? 32 : 16;
constexpr int kRows = 6, kVectors = kRegisters == 32 ? 4 : 2;  // rows * vectors sums, the vectors, a number

template <class T, int R, int P>
KSSM_FN void tile(int64_t depth, const T* weights, int64_t stride, const T* const* in, T* const* out, int64_t column) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  V sums[R][P];
  KSSM_UNROLL
  for (int r = 0; r < R; ++r) {
    KSSM_UNROLL
    for (int p = 0; p < P; ++p) sums[r][p] = load(out[r] + column + p * W);
  }
  for (int64_t k = 0; k < depth; ++k) {
    V w[P];
    KSSM_UNROLL
    for (int p = 0; p < P; ++p) w[p] = load(weights + k * stride + column + p * W);
    KSSM_UNROLL
    for (int r = 0; r < R; ++r) {
      const V x = splat<V>(in[r][k]);
      KSSM_UNROLL
      for (int p = 0; p < P; ++p) sums[r][p] = fma(x, w[p], sums[r][p]);
    }
  }
  KSSM_UNROLL
  for (int r = 0; r < R; ++r) {
    KSSM_UNROLL
    for (int p = 0; p < P; ++p) store(out[r] + column + p * W, sums[r][p]);
  }
}

template <class T, int P, int R = kRows>
KSSM_FN void column_of_tiles(int64_t rows, int64_t depth, const T* weights, int64_t stride, const T* const* in,
                             T* const* out, int64_t column) {
  for (; rows >= R; rows -= R, in += R, out += R) tile<T, R, P>(depth, weights, stride, in, out, column);
  if constexpr (R > 1) {
    if (rows) column_of_tiles<T, P, R - 1>(rows, depth, weights, stride, in, out, column);
  }
}

}  // namespace products

// out[r][c] += sum_k in[r][k] weights[k][c] for c < columns, whole vectors, in the order of k: the bits of a row do not
// depend on the rows beside it.
template <class T>
__attribute__((noinline)) void add_products(int64_t rows, int64_t depth, int64_t columns, const T* weights,
                                            const T* const* in, T* const* out) {
  constexpr int64_t W = kLanes<T>, P = products::kVectors;
  int64_t c = 0;
  for (; c + P * W <= columns; c += P * W) products::column_of_tiles<T, P>(rows, depth, weights, columns, in, out, c);
  for (; c < columns; c += W) products::column_of_tiles<T, 1>(rows, depth, weights, columns, in, out, c);
}

KSSM_NAMESPACE_END
