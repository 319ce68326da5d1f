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

}  // namespace

template <class T> void harmonic_sums(const T* theta, int64_t n, int harmonics, FeatureWork<T>& work) {
  const Groups groups(harmonics);
  Vec<T>* const vectors = work.vectors;
  for (int64_t i = 0; i < sum_vectors(harmonics); ++i) vectors[i] = Vec<T>{};
  if (groups.half == 1) add_row<T, 1>(theta, n, groups.count, vectors);
  else if (groups.half == 2) add_row<T, 2>(theta, n, groups.count, vectors);
  else if (groups.half == 4) add_row<T, 4>(theta, n, groups.count, vectors);
  else add_row<T, 8>(theta, n, groups.count, vectors);
  reduce_lanes<T>(vectors, groups.numbers(), work.packed);
  unpack_sums<T>(work.packed, harmonics, work.sums, work.sums + harmonics);
}

template <class T> void harmonic_adjoint(const T* theta, int64_t n, int harmonics, const T* numbers, T* g) {
  const Groups groups(harmonics);
  if (groups.half == 1) add_adjoint_row<T, 1>(theta, n, groups.count, numbers, g);
  else if (groups.half == 2) add_adjoint_row<T, 2>(theta, n, groups.count, numbers, g);
  else if (groups.half == 4) add_adjoint_row<T, 4>(theta, n, groups.count, numbers, g);
  else add_adjoint_row<T, 8>(theta, n, groups.count, numbers, g);
}

template void harmonic_sums<float>(const float*, int64_t, int, FeatureWork<float>&);
template void harmonic_sums<double>(const double*, int64_t, int, FeatureWork<double>&);
template void harmonic_adjoint<float>(const float*, int64_t, int, const float*, float*);
template void harmonic_adjoint<double>(const double*, int64_t, int, const double*, double*);

KSSM_NAMESPACE_END
