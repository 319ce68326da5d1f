// Sums over harmonics n = 1..H from one sine and one cosine, by products to sums.
//
// Write n = b + a with b = m, 2m, .., Km and |a| <= A, m = 2A + 1, and n = a for b = 0. From
//   cos(b +- a) = c_b c_a -+ s_b s_a,   sin(b +- a) = s_b c_a +- c_b s_a        (c_a = cos a theta, ..)
// Forward: the sums over oscillators of c_b c_a, s_b s_a, c_b s_a, s_b c_a give all 2H sums of cosines and sines:
// one multiply-add each, and only A + K pairs (c, s) to make: the first A by products, the rest by the recurrence
// x_{b+m} = 2 cos(m theta) x_b - x_{b-m}.
// Backward: sum_n p_n cos(n theta) + q_n sin(n theta) = X_0 + sum_b c_b X_b + s_b Y_b, where X_b, Y_b are sums over a of
// c_a, s_a times numbers of the ensemble; Clenshaw's recurrence in m theta adds up the b.
//
// Against the plain recurrence in n: half the operations where additions and multiply-adds share their units, and an
// error that grows as (H/m)^2 instead of H^2.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

constexpr int kMaxHarmonics = 256;

// A, which is 1, 2, 4 or 8, and K, as above.
struct Groups {
  int half, count;
  KSSM_FN explicit Groups(int harmonics)
      : half(harmonics <= 2 ? harmonics : harmonics <= 40 ? 2 : harmonics <= 144 ? 4 : 8),
        count(harmonics > half ? (harmonics + half) / (2 * half + 1) : 0) {}
  KSSM_FN int stride() const { return 2 * half + 1; }
  KSSM_FN int per_group() const { return 4 * half + 2; }
  KSSM_FN int numbers() const { return half ? (count + 1) * per_group() : 0; }
};
constexpr int kMaxGroupNumbers = 16 * 34;  // at H = 256

// c[a], s[a] = cos, sin of a theta for a = 1..COUNT; c[1], s[1] are given.
template <int COUNT, class V> KSSM_FN void powers(V* c, V* s) {
  KSSM_UNROLL
  for (int a = 2; a <= COUNT; ++a) {
    const int h = a / 2, k = a - h;
    c[a] = fma(c[h], c[k], -(s[h] * s[k]));
    s[a] = h == k ? (c[h] + c[h]) * s[h] : fma(s[h], c[k], c[h] * s[k]);
  }
}

// The forward's sums of one ensemble, per_group() numbers for each of b = 0, m, ..: { c_b, s_b, then for a = 1..A:
// c_b c_a, s_b s_a, c_b s_a, s_b c_a }; of b = 0 only c_b c_a (= c_a) and c_b s_a (= s_a) are read.
template <class T> KSSM_FN void unpack_sums(const T* sums, int harmonics, T* cosines, T* sines) {
  const Groups groups(harmonics);
  const int half = groups.half, m = groups.stride();
  for (int a = 1; a <= half; ++a) {
    cosines[a - 1] = sums[4 * a - 2];
    sines[a - 1] = sums[4 * a];
  }
  for (int k = 1; k <= groups.count; ++k) {
    const T* row = sums + k * groups.per_group();
    const int b = k * m;
    if (b <= harmonics) {
      cosines[b - 1] = row[0];
      sines[b - 1] = row[1];
    }
    for (int a = 1; a <= half; ++a) {
      const T cc = row[4 * a - 2], ss = row[4 * a - 1], cs = row[4 * a], sc = row[4 * a + 1];
      if (b - a <= harmonics) {
        cosines[b - a - 1] = cc + ss;
        sines[b - a - 1] = sc - cs;
      }
      if (b + a <= harmonics) {
        cosines[b + a - 1] = cc - ss;
        sines[b + a - 1] = sc + cs;
      }
    }
  }
}

// The backward's numbers, in the same places: { p_b, q_b, then for a: X's on c_a, X's on s_a, Y's on c_a, Y's on s_a }.
template <class T> KSSM_FN void group_numbers(const T* on_cos, const T* on_sin, int harmonics, T* numbers) {
  const Groups groups(harmonics);
  const auto at = [&](const T* x, int n) { return n >= 1 && n <= harmonics ? x[n - 1] : T{}; };
  for (int k = 0; k <= groups.count; ++k) {
    T* row = numbers + k * groups.per_group();
    const int b = k * groups.stride();
    row[0] = at(on_cos, b);
    row[1] = at(on_sin, b);
    for (int a = 1; a <= groups.half; ++a) {
      const T p_up = at(on_cos, b + a), p_down = at(on_cos, b - a), q_up = at(on_sin, b + a), q_down = at(on_sin, b - a);
      row[4 * a - 2] = p_up + p_down;
      row[4 * a - 1] = q_up - q_down;
      row[4 * a] = q_up + q_down;
      row[4 * a + 1] = p_down - p_up;
    }
  }
}

// The magnitude M of one order parameter C + iS, from C^2 + S^2.
template <class T> KSSM_FN T magnitude(T square) { return square_root(square + splat<T>(Scalar<T>(1e-8))); }

// M, and C + iS put back on the unit disk: the parts of equal addends add up some ulp past N. The disk holds the true
// value, so that no step leads away from it.
template <class T> KSSM_FN T into_unit_disk(T& c, T& s) {
  const T one = splat<T>(Scalar<T>(1)), square = c * c + s * s;
  const T scale = one / square_root(square > one ? square : one);
  c = c * scale;
  s = s * scale;
  return magnitude(c * c + s * s);
}

KSSM_NAMESPACE_END
