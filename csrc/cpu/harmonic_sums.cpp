// The sums over harmonics of one row: the loops of harmonic_tile.h, compiled once for all ops (they are most of the build).

#include "harmonic_sums.h"

#include "harmonic_tile.h"

KSSM_NAMESPACE_BEGIN

namespace {

typedef float FourFloats __attribute__((vector_size(16)));
typedef double TwoDoubles __attribute__((vector_size(16)));

// sums[i] = the lanes of x[i] added up, by transposing as they are added
KSSM_FN FourFloats add_across(const FourFloats (&x)[4]) {
#if defined(__clang__) || __GNUC__ >= 12
  const FourFloats a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5) + __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const FourFloats b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5) + __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
#else
  FourFloats sums;
  for (int i = 0; i < 4; ++i) sums[i] = (x[i][0] + x[i][2]) + (x[i][1] + x[i][3]);
  return sums;
#endif
}
KSSM_FN TwoDoubles add_across(const TwoDoubles (&x)[2]) {
  return TwoDoubles{x[0][0], x[1][0]} + TwoDoubles{x[0][1], x[1][1]};
}

template <class T> struct Quarter;
template <> struct Quarter<float> { using V = FourFloats; };
template <> struct Quarter<double> { using V = TwoDoubles; };

// out[i] = the lanes of vectors[i] added up; both are read and written in whole groups of 16 bytes of out.
template <class T> KSSM_FN void reduce_lanes(const Vec<T>* vectors, int64_t count, T* out) {
  using Q = typename Quarter<T>::V;
  constexpr int G = 16 / static_cast<int>(sizeof(T));
  for (int64_t i = 0; i < count; i += G) {
    Q x[G];
    for (int g = 0; g < G; ++g) {
      const T* lanes = reinterpret_cast<const T*>(vectors + i + g);
      __builtin_memcpy(&x[g], lanes, 16);
      for (int k = 1; k < kBytes / 16; ++k) {
        Q more;
        __builtin_memcpy(&more, lanes + k * G, 16);
        x[g] = x[g] + more;
      }
    }
    const Q sums = add_across(x);
    __builtin_memcpy(out + i, &sums, 16);
  }
}

template <int N> struct Constant { static constexpr int value = N; };

// f with the A of csrc/math/harmonics.h as a constant
template <class F> KSSM_FN void with_half(const Groups& groups, const F& f) {
  if (groups.half == 1) f(Constant<1>{});
  else if (groups.half == 2) f(Constant<2>{});
  else if (groups.half == 4) f(Constant<4>{});
  else f(Constant<8>{});
}

template <class T, class Phases>
KSSM_FN void sum_run(Phases& phases, int64_t n, int harmonics, int64_t vectors, Vec<T>* sums) {
  const Groups groups(harmonics);
  for (int64_t i = 0; i < vectors; ++i) sums[i] = Vec<T>{};
  with_half(groups, [&](auto half) { add_run<T, decltype(half)::value>(phases, n, groups.count, sums); });
}

template <class T, class Phases, class Out, class Numbers>
KSSM_FN void adjoint(Phases& phases, int64_t n, int harmonics, const Numbers* weights, Numbers* numbers, Out& out) {
  const Groups groups(harmonics);
  group_numbers(weights, weights + harmonics, harmonics, numbers);
  with_half(groups, [&](auto half) {
    adjoint_run<T, decltype(half)::value>(phases, n, groups.count, numbers, out);
  });
}

}  // namespace

template <class T> void harmonic_sums(const T* theta, int64_t n, int harmonics, FeatureWork<T>& work) {
  RowPhases<T> phases{theta};
  sum_run<T>(phases, n, harmonics, sum_vectors(harmonics), work.vectors);
  reduce_lanes<T>(work.vectors, Groups(harmonics).numbers(), work.packed);
  unpack_sums<T>(work.packed, harmonics, work.sums, work.sums + harmonics);
}

template <class T>
void harmonic_adjoint(const T* theta, int64_t n, int harmonics, const T* weights, T* numbers, T* g) {
  RowPhases<T> phases{theta};
  RowSums<T> out{g};
  adjoint<T>(phases, n, harmonics, weights, numbers, out);
}

template <class T> void lane_features(const T* const* theta, int64_t n, int harmonics, LaneWork<T>& work, T* const* features) {
  constexpr int W = kLanes<T>;
  LanePhases<T> phases(theta);
  Vec<T>* const columns = work.columns;
  sum_run<T>(phases, n * W, harmonics, Groups(harmonics).numbers(), work.numbers);
  unpack_sums<Vec<T>>(work.numbers, harmonics, columns, columns + harmonics);
  const Vec<T> count = splat<Vec<T>>(static_cast<T>(n));
  for (int h = 0; h < harmonics; ++h) {
    Vec<T> c = columns[h] / count, s = columns[harmonics + h] / count;
    const Vec<T> square = c * c + s * s;
    // rare, and a division and a root for each harmonic are 6 % of a set of rows
    const bool outside = any((Int<Vec<T>>)(square > splat<Vec<T>>(T(1))));
    columns[2 * harmonics + h] = outside ? into_unit_disk(c, s) : magnitude(square);
    columns[h] = c;
    columns[harmonics + h] = s;
  }
  for (int64_t h = 3 * harmonics; h < work.stride; ++h) columns[h] = Vec<T>{};
  lanes_to_rows<T>(columns, work.stride, [&](int i) { return features[i]; });
}

template <class T> void lane_adjoint(const T* const* theta, int64_t n, int harmonics, LaneWork<T>& work, T* const* g) {
  constexpr int W = kLanes<T>;
  LanePhases<T> phases(theta);
  LaneRowsOut<T> out(g);
  rows_to_lanes<T>([&](int i) { return work.rows[i]; }, 2 * harmonics, static_cast<Vec<T>*>(work.columns));
  adjoint<T>(phases, n * W, harmonics, static_cast<const Vec<T>*>(work.columns), static_cast<Vec<T>*>(work.numbers),
             out);
}

#define KSSM_INSTANTIATE(T)                                                                    \
  template void harmonic_sums<T>(const T*, int64_t, int, FeatureWork<T>&);                     \
  template void harmonic_adjoint<T>(const T*, int64_t, int, const T*, T*, T*);                 \
  template void lane_features<T>(const T* const*, int64_t, int, LaneWork<T>&, T* const*);      \
  template void lane_adjoint<T>(const T* const*, int64_t, int, LaneWork<T>&, T* const*);
KSSM_INSTANTIATE(float)
KSSM_INSTANTIATE(double)

KSSM_NAMESPACE_END
