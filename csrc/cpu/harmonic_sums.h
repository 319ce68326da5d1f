// Order parameters of rows of phases, and their adjoint: of one row, or of as many rows as a vector has lanes.
#pragma once

#include "memory.h"
#include "parallel.h"

#include "../math/harmonics.h"

KSSM_NAMESPACE_BEGIN

// Vectors that the sums of one row need: whole groups of reduce_lanes.
KSSM_FN int64_t sum_vectors(int harmonics) { return (Groups(harmonics).numbers() + 3) / 4 * 4; }

// What the features of one row are computed in.
template <class T> struct FeatureWork {
  FeatureWork(int harmonics, bool& ok)
      : vectors(sum_vectors(harmonics), ok), packed(sum_vectors(harmonics), ok), sums(2 * harmonics, ok),
        row(3 * harmonics, ok) {}
  Buffer<Vec<T>> vectors;
  Buffer<T> packed, sums, row;
};

// work.sums = sum_j cos(n theta_j) for n = 1..H, then the sines. theta may be read up to the next whole vector.
template <class T> void harmonic_sums(const T* theta, int64_t n, int harmonics, FeatureWork<T>& work);

// g[j] += dL/dtheta_j for a row whose weights (2H, see adjoint_weights) are known; theta and g may be touched up to the
// next whole vector. numbers: kMaxGroupNumbers elements of work.
template <class T>
void harmonic_adjoint(const T* theta, int64_t n, int harmonics, const T* weights, T* numbers, T* g);

// Rows of up to this many oscillators go together, one in each lane: nothing is added up across lanes and no row ends
// inside a vector. It depends on n alone, so that an ensemble's bits do not depend on how many others there are; the
// price is that fewer rows than lanes cost as much as a full set.
constexpr int64_t kLaneRows = 256;
template <class T> KSSM_FN int64_t rows_together(int64_t n) { return n <= kLaneRows ? kLanes<T> : 1; }

// What the features of such rows, or their adjoint, are computed in.
template <class T> struct LaneWork {
  LaneWork(int harmonics, bool& ok)
      : stride(padded<T>(3 * harmonics)), numbers(Groups(harmonics).numbers(), ok), columns(stride, ok),
        rows(harmonics ? kLanes<T> : 0, 3 * harmonics, ok) {}
  const int64_t stride;
  Buffer<Vec<T>> numbers, columns;
  Rows<T> rows;  // features, or weights
};

// features[i] = [C | S | M] of the kLanes rows theta[i] of n <= kLaneRows phases. Rows are touched up to the next whole
// vector.
template <class T>
void lane_features(const T* const* theta, int64_t n, int harmonics, LaneWork<T>& work, T* const* features);

// g[i][j] = dL/dtheta_ij, each row's weights in work.rows.
template <class T> void lane_adjoint(const T* const* theta, int64_t n, int harmonics, LaneWork<T>& work, T* const* g);

// Writes [C | S | M] of one row. phases(begin, count, scratch) gives the address of at most kRowBlock phases
// that may be read up to the next whole vector; scratch is null for a row of one block. A longer row's blocks are
// shared out among the threads, and their sums added in order, in double.
template <class T, class Phases>
inline void row_features(int64_t n, int harmonics, int threads, const Phases& phases, FeatureWork<T>& work, int64_t code,
                         void* target, bool& ok, Watch* watch) {
  const int64_t blocks = (n + kRowBlock - 1) / kRowBlock, width = 2 * harmonics;
  T *sums = work.sums, *row = work.row;
  if (blocks <= 1) {
    harmonic_sums<T>(phases(0, n, nullptr), n, harmonics, work);
  } else {
    Buffer<double> partial(blocks * width, ok);
    if (failed(ok)) return;
    parallel_for(blocks, threads, [&](int64_t b) {
      const int64_t begin = b * kRowBlock, count = n - begin < kRowBlock ? n - begin : kRowBlock;
      RowBuffer<T> scratch(count, ok);
      FeatureWork<T> own(harmonics, ok);
      if (failed(ok)) return;
      harmonic_sums<T>(phases(begin, count, scratch), count, harmonics, own);
      for (int64_t i = 0; i < width; ++i) partial[b * width + i] = static_cast<double>(own.sums[i]);
    }, watch);
    for (int64_t i = 0; i < width; ++i) {
      double sum = 0.0;
      for (int64_t b = 0; b < blocks; ++b) sum += partial[b * width + i];
      sums[i] = static_cast<T>(sum);
    }
  }
  const T count = static_cast<T>(n);
#pragma omp simd
  for (int h = 0; h < harmonics; ++h) {
    T c = sums[h] / count, s = sums[harmonics + h] / count;
    row[2 * harmonics + h] = into_unit_disk(c, s);
    row[h] = c;
    row[harmonics + h] = s;
  }
  store_row<T>(code, target, 3 * harmonics, row);
}

// From a row's features and their gradient, what the adjoint of its phases multiplies the cosines and the sines with:
// weights, 2H elements. work: 6H elements.
template <class T>
inline void adjoint_weights(int64_t code, const void* features, const void* gradient, int64_t n, int harmonics, T* work,
                            T* weights) {
  const T* f = contiguous_row<T>(code, features, 3 * harmonics, work);
  const T* g = contiguous_row<T>(code, gradient, 3 * harmonics, work + 3 * harmonics);
  T *on_cos = weights, *on_sin = weights + harmonics;
  const T count = static_cast<T>(n);
#pragma omp simd
  for (int h = 0; h < harmonics; ++h) {
    const T pull_m = g[2 * harmonics + h] / f[2 * harmonics + h], weight = static_cast<T>(h + 1) / count;
    on_cos[h] = weight * (g[harmonics + h] + pull_m * f[harmonics + h]);
    on_sin[h] = -weight * (g[h] + pull_m * f[h]);
  }
}

KSSM_NAMESPACE_END
