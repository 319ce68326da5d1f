// The sums of a row's row blocks, added in their order: up to 256 at a time, until one is left.
#pragma once

#include "storage.h"

#include "../math/harmonics.h"

KSSM_NAMESPACE_BEGIN

constexpr int64_t kRowBlock = 2048;  // oscillators that one team takes at a time if it leaves no harmonics
constexpr int64_t kRowBlocksAtOnce = 256;

// What becomes of the last sums.
enum class Ending { kNone, kMean, kFeatures };

// in [rows, row_blocks, 2H] to out [rows, groups, 2H], the sums of 256 blocks each; or, of the last group, sums / n as
// [rows, 2H], or features [rows, 3H]. A thread adds one harmonic's two sums, in double: the numbers are few.
template <class S>
__global__ void __launch_bounds__(256)
    sum_row_blocks(const Compute<S>* in, int64_t rows, int64_t row_blocks, int64_t n, int64_t harmonics, void* out,
                 Ending end) {
  using T = Compute<S>;
  const int64_t groups = (row_blocks + kRowBlocksAtOnce - 1) / kRowBlocksAtOnce;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * groups * harmonics) return;
  const int64_t h = i % harmonics, of = i / harmonics, row = of / groups, group = of % groups;
  const int64_t first = group * kRowBlocksAtOnce, left = row_blocks - first;
  const int64_t count = left < kRowBlocksAtOnce ? left : kRowBlocksAtOnce;
  const T* p = in + (row * row_blocks + first) * 2 * harmonics + h;
  double c = 0.0, s = 0.0;
  for (int64_t k = 0; k < count; ++k, p += 2 * harmonics) {
    c += static_cast<double>(load(p));
    s += static_cast<double>(load(p + harmonics));
  }
  if (end == Ending::kFeatures) {
    T mean_c = static_cast<T>(c / static_cast<double>(n)), mean_s = static_cast<T>(s / static_cast<double>(n));
    S* const y = static_cast<S*>(out) + row * 3 * harmonics + h;
    store(y + 2 * harmonics, into_unit_disk(mean_c, mean_s));
    store(y, mean_c);
    store(y + harmonics, mean_s);
    return;
  }
  const double scale = end == Ending::kMean ? static_cast<double>(n) : 1.0;
  T* const y = static_cast<T*>(out) + of * 2 * harmonics + h;
  store(y, static_cast<T>(c / scale));
  store(y + harmonics, static_cast<T>(s / scale));
}

// workspace: the row blocks' sums, and room behind them for those of all later rounds.
template <class S>
int sum_rows(int64_t workspace, int64_t rows, int64_t row_blocks, int64_t n, int64_t harmonics, int64_t out, Ending end,
             void* stream) {
  using T = Compute<S>;
  const T* in = reinterpret_cast<const T*>(workspace);
  for (;;) {
    const int64_t groups = (row_blocks + kRowBlocksAtOnce - 1) / kRowBlocksAtOnce;
    const T* const next = in + rows * row_blocks * 2 * harmonics;
    void* const to = groups == 1 ? reinterpret_cast<void*>(out) : const_cast<T*>(next);
    const int64_t blocks = (rows * groups * harmonics + 255) / 256;
    const int error = launch(sum_row_blocks<S>, blocks, 256, 0, stream, in, rows, row_blocks, n, harmonics, to,
                             groups == 1 ? end : Ending::kNone);
    if (error || groups == 1) return error;
    in = next;
    row_blocks = groups;
  }
}

template <class S>
int sum_features(int64_t workspace, int64_t rows, int64_t row_blocks, int64_t n, int64_t harmonics, int64_t features,
                 void* stream) {
  return sum_rows<S>(workspace, rows, row_blocks, n, harmonics, features, Ending::kFeatures, stream);
}

KSSM_NAMESPACE_END
