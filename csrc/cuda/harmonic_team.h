// A team's sums over harmonics of its row (csrc/math/harmonic_groups.h), the features they make, and their adjoint.
#pragma once

#include "team.h"

#include "../math/harmonic_groups.h"
#include "../math/harmonics.h"
#include "../math/sincos_any.h"

KSSM_NAMESPACE_BEGIN

// Oscillators whose way from group to group a thread goes at once, nine registers each: beside a pass's seventy sums,
// and for each reading of a group's numbers.
constexpr int kForwardTogether = 2;
template <class T> constexpr int kBackwardTogether = sizeof(T) == 8 ? 2 : 4;

// Part `part` of an array in registers, and back.
template <int PART, class T, int K> KSSM_DEVICE void take_part(const T (&x)[K], int part, T (&y)[PART]) {
  KSSM_UNROLL
  for (int k = 0; k < K; ++k) y[k % PART] = k < PART || k / PART == part ? x[k] : y[k % PART];
}
template <int PART, class T, int K> KSSM_DEVICE void add_part(T (&x)[K], int part, const T (&y)[PART]) {
  KSSM_UNROLL
  for (int k = 0; k < K; ++k) x[k] += k / PART == part ? y[k % PART] : T(0);
}

// ---- forward ----

// Shared memory of a team: a pass's sums of each warp, then the row of features.
template <class T> KSSM_FN int64_t sums_bytes(int lanes) {
  return (lanes > kWarp ? lanes / kWarp : 1) * kPassNumbers * static_cast<int64_t>(sizeof(T));
}
KSSM_FN int64_t whole_vectors(int64_t bytes) { return (bytes + 15) / 16 * 16; }
template <class T> KSSM_FN int64_t features_bytes(int lanes, int64_t harmonics) {
  return whole_vectors(sums_bytes<T>(lanes)) + whole_vectors(3 * harmonics * static_cast<int64_t>(sizeof(T)));
}

// sums += those of a pass over the thread's oscillators; live: a bit for each that takes part.
template <class T, int K>
KSSM_DEVICE void add_harmonics(const T (&theta)[K], unsigned live, int groups, int pass, T (&sums)[kPassNumbers]) {
  constexpr int P = kForwardTogether;
  KSSM_ROLLED
  for (int part = 0; part < K / P; ++part) {
    T x[P], s[P], c[P];
    take_part(theta, part, x);
    sincos_any(x, s, c);
    Walk<T> walk[P];
    KSSM_UNROLL
    for (int i = 0; i < P; ++i) {
      const bool alive = live >> (part * P + i) & 1;
      walk[i].start(alive ? c[i] : T(0), alive ? s[i] : T(0), pass);
    }
    KSSM_UNROLL
    for (int g = 0; g < kPassGroups; ++g) {
      if (g >= groups) break;
      KSSM_UNROLL
      for (int i = 0; i < P; ++i) {
        walk[i].add_to(sums + g * kGroupNumbers);
        walk[i].advance();
      }
    }
  }
}

// row = the team's sums of cos(n theta), n = 1..H, then of sin(n theta), in shared memory. phases(i, theta): the
// thread's i-th K phases, i < rounds, and a bit for each that exists. Barriers before the row may be read and after
// `sums` has been.
template <class T, int K, class Phases>
KSSM_DEVICE void harmonic_sums(const Team& team, int harmonics, int rounds, const Phases& phases, T* sums, T* row) {
  for (int pass = 0; pass < passes_of(harmonics); ++pass) {
    const int groups = groups_in(harmonics, pass);
    T x[kPassNumbers];
    KSSM_UNROLL
    for (int k = 0; k < kPassNumbers; ++k) x[k] = T(0);
    for (int i = 0; i < rounds; ++i) {
      T theta[K];
      const unsigned live = phases(i, theta);
      add_harmonics(theta, live, groups, pass, x);
    }
    warp_sums(team, x, sums);
    team.sync();
    if (team.warps() > 1) {
      for (int k = team.rank; k < kPassNumbers; k += team.lanes) {
        T sum = sums[k];
        for (int w = 1; w < team.warps(); ++w) sum += sums[w * kPassNumbers + k];
        sums[k] = sum;
      }
      team.sync();
    }
    const int first = pass * kPass, count = harmonics - first < kPass ? harmonics - first : kPass;
    for (int h = team.rank; h < count; h += team.lanes) {
      const Turn<T> sum = unpack_group(sums + h / kGroup * kGroupNumbers, h % kGroup - 2);
      row[first + h] = sum.c;
      row[harmonics + first + h] = sum.s;
    }
    team.sync();
  }
}

// Sums to [C | S | M], in place.
template <class T> KSSM_DEVICE void finish_features(const Team& team, int64_t n, int harmonics, T* row) {
  const T count = static_cast<T>(n);
  for (int h = team.rank; h < harmonics; h += team.lanes) {
    T c = row[h] / count, s = row[harmonics + h] / count;
    row[2 * harmonics + h] = into_unit_disk(c, s);
    row[h] = c;
    row[harmonics + h] = s;
  }
  team.sync();
}

// A row in shared memory to one in global memory.
template <class S> KSSM_DEVICE void write_row(const Team& team, const Compute<S>* row, int count, S* out) {
  constexpr int V = kVector<S>;
  if (!aligned(out)) {
    for (int i = team.rank; i < count; i += team.lanes) store(out + i, row[i]);
    return;
  }
  for (int i = team.rank * V; i < count; i += team.lanes * V) {
    Compute<S> x[V];
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) x[v] = i + v < count ? row[i + v] : Compute<S>(0);
    store_run(out + i, count - i, x);
  }
}

// ---- backward ----

constexpr int kPaddedNumbers = 12;  // a group's ten, in whole vectors

// Shared memory of a team: the numbers of every group, then what the cosines and sines are multiplied with.
template <class T> KSSM_FN int64_t numbers_bytes(int64_t harmonics) {
  return groups_of(static_cast<int>(harmonics)) * kPaddedNumbers * static_cast<int64_t>(sizeof(T));
}
template <class T> KSSM_FN int64_t adjoint_bytes(int64_t harmonics) {
  return numbers_bytes<T>(harmonics) + whole_vectors(2 * harmonics * static_cast<int64_t>(sizeof(T)));
}

// Features and their gradient, of a storage type that need not be the phases'.
// numbers = those of a row; barriers before they may be read and after others have been.
template <class T>
KSSM_DEVICE void read_numbers(const Team& team, const SavedFeatures& saved, int64_t row, int64_t n, int harmonics, T* numbers) {
  T* const on_cos = numbers + groups_of(harmonics) * kPaddedNumbers;
  T* const on_sin = on_cos + harmonics;
  const T count = static_cast<T>(n);
  const auto feature = [&](int i) { return load_coded<T>(saved.code, saved.features, row * 3 * harmonics + i); };
  const auto gradient = [&](int i) { return load_coded<T>(saved.code, saved.g_features, row * 3 * harmonics + i); };
  for (int h = team.rank; h < harmonics; h += team.lanes) {
    const T pull_m = gradient(2 * harmonics + h) / feature(2 * harmonics + h), weight = static_cast<T>(h + 1) / count;
    on_cos[h] = weight * (gradient(harmonics + h) + pull_m * feature(harmonics + h));
    on_sin[h] = -weight * (gradient(h) + pull_m * feature(h));
  }
  team.sync();
  for (int g = team.rank; g < groups_of(harmonics); g += team.lanes)
    group_numbers(on_cos, on_sin, harmonics, g, numbers + g * kPaddedNumbers);
  team.sync();
}

template <class T> struct alignas(16) Numbers {
  T x[kPaddedNumbers];
};

// g += the features' adjoint at the thread's phases.
template <class T, int K>
KSSM_DEVICE void add_adjoint(const T (&theta)[K], int harmonics, const T* shared_numbers, T (&g)[K]) {
  constexpr int P = kBackwardTogether<T>;
  const Numbers<T>* const numbers = reinterpret_cast<const Numbers<T>*>(shared_numbers);
  KSSM_ROLLED
  for (int part = 0; part < K / P; ++part) {
    T x[P], s[P], c[P], sum[P];
    take_part(theta, part, x);
    sincos_any(x, s, c);
    KSSM_UNROLL
    for (int i = 0; i < P; ++i) sum[i] = T(0);
    Walk<T> walk[P];
    KSSM_ROLLED
    for (int pass = 0; pass < passes_of(harmonics); ++pass) {
      KSSM_UNROLL
      for (int i = 0; i < P; ++i) walk[i].start(c[i], s[i], pass);
      const int first = pass * kPassGroups, last = first + groups_in(harmonics, pass);
      for (int group = first; group < last; ++group) {
        const Numbers<T> of_group = numbers[group];
        KSSM_UNROLL
        for (int i = 0; i < P; ++i) {
          sum[i] = walk[i].weigh(of_group.x, sum[i]);
          walk[i].advance();
        }
      }
    }
    add_part(g, part, sum);
  }
}

KSSM_NAMESPACE_END
