// Sums over harmonics n = 1..H with all sums of a pass in registers, for processors with hundreds of them (csrc/cuda).
//
// As in harmonics.h, with A = 2: groups of five harmonics n = b - 2 .. b + 2 around b = 3, 8, 13, .. from ten numbers
// { c_b, s_b, then for a = 1, 2: c_b c_a, s_b s_a, c_b s_a, s_b c_a }, one multiply-add each; c_b and s_b walk by
// x_{b+5} = 2 cos(5 theta) x_b - x_{b-5}. Seven groups are a pass: 70 sums. Every pass starts anew from powers of
// cos theta + i sin theta, whose error grows as n, where a recurrence through all groups would lose (H/5)^2 ulp.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

constexpr int kGroup = 5, kGroupNumbers = 10, kPassGroups = 7, kPass = kGroup * kPassGroups;
constexpr int kPassNumbers = kPassGroups * kGroupNumbers;

KSSM_FN int groups_of(int harmonics) { return (harmonics + kGroup - 1) / kGroup; }
KSSM_FN int passes_of(int harmonics) { return (harmonics + kPass - 1) / kPass; }
// groups of one pass
KSSM_FN int groups_in(int harmonics, int pass) {
  const int left = groups_of(harmonics) - pass * kPassGroups;
  return left < kPassGroups ? left : kPassGroups;
}

// cos + i sin of a multiple of theta
template <class V> struct Turn {
  V c, s;
};
template <class V> KSSM_FN Turn<V> operator*(Turn<V> x, Turn<V> y) {
  return {fma(x.c, y.c, -(x.s * y.s)), fma(x.s, y.c, x.c * y.s)};
}
template <class V> KSSM_FN Turn<V> square(Turn<V> x) { return {fma(x.c, x.c, -(x.s * x.s)), (x.c + x.c) * x.s}; }
template <class V> KSSM_FN Turn<V> conjugate(Turn<V> x) { return {x.c, -x.s}; }

// One oscillator on its way from group to group. All zero stays all zero: an oscillator that takes no part.
template <class V> struct Walk {
  Turn<V> one, two, at, before;  // theta, 2 theta, b theta, (b - 5) theta
  V twice;                       // 2 cos(5 theta)

  KSSM_FN void start(V cos, V sin, int pass) {
    one = {cos, sin};
    two = square(one);
    const Turn<V> three = one * two, five = two * three;
    // The products leave `five` some ulp off the unit circle, which the recurrence would amplify: put back on it.
    const V excess = fma(five.s, five.s, fma(five.c, five.c, splat<V>(Scalar<V>(-1))));
    twice = fma(-five.c, excess, five.c + five.c);
    at = three;
    before = conjugate(two);
    if (pass > 0) {
      const Turn<V> ten = square(five), thirty_five = square(ten) * ten * five;
      Turn<V> first = thirty_five;
      KSSM_ROLLED
      for (int k = 1; k < pass; ++k) first = first * thirty_five;
      at = first * at;
      before = first * before;
    }
  }
  KSSM_FN void advance() {
    const Turn<V> next = {fma(twice, at.c, -before.c), fma(twice, at.s, -before.s)};
    before = at;
    at = next;
  }
  KSSM_FN void add_to(V* sums) const {
    sums[0] = sums[0] + at.c;
    sums[1] = sums[1] + at.s;
    add_products(one, sums + 2);
    add_products(two, sums + 6);
  }
  // sum + what the group's harmonics add: p_n cos(n theta) + q_n sin(n theta), by the numbers of group_numbers
  KSSM_FN V weigh(const V* numbers, V sum) const {
    const V x = on(numbers + 2, one, on(numbers + 6, two, numbers[0]));
    const V y = on(numbers + 4, one, on(numbers + 8, two, numbers[1]));
    return fma(at.c, x, fma(at.s, y, sum));
  }

 private:
  KSSM_FN void add_products(const Turn<V>& a, V* sums) const {
    sums[0] = fma(at.c, a.c, sums[0]);
    sums[1] = fma(at.s, a.s, sums[1]);
    sums[2] = fma(at.c, a.s, sums[2]);
    sums[3] = fma(at.s, a.c, sums[3]);
  }
  KSSM_FN static V on(const V* pair, const Turn<V>& a, V sum) { return fma(pair[0], a.c, fma(pair[1], a.s, sum)); }
};

// The sums of cos(n theta) and sin(n theta), n = b + a, from the ten of the group around b; a = -2 .. 2.
template <class V> KSSM_FN Turn<V> unpack_group(const V* sums, int a) {
  if (a == 0) return {sums[0], sums[1]};
  const V* x = sums + (a == 1 || a == -1 ? 2 : 6);
  return a > 0 ? Turn<V>{x[0] - x[1], x[3] + x[2]} : Turn<V>{x[0] + x[1], x[3] - x[2]};
}

// What weigh() takes: { p_b, q_b, then for a = 1, 2: X's on c_a, X's on s_a, Y's on c_a, Y's on s_a }, where the group
// adds c_b X + s_b Y.
template <class V>
KSSM_FN void group_numbers(const V* on_cos, const V* on_sin, int harmonics, int group, V* numbers) {
  const int b = kGroup * group + 3;
  const auto at = [&](const V* x, int n) { return n <= harmonics ? x[n - 1] : V{}; };
  numbers[0] = at(on_cos, b);
  numbers[1] = at(on_sin, b);
  for (int a = 1; a <= 2; ++a) {
    const V p_up = at(on_cos, b + a), p_down = at(on_cos, b - a), q_up = at(on_sin, b + a), q_down = at(on_sin, b - a);
    numbers[4 * a - 2] = p_up + p_down;
    numbers[4 * a - 1] = q_up - q_down;
    numbers[4 * a] = q_up + q_down;
    numbers[4 * a + 1] = p_down - p_up;
  }
}

KSSM_NAMESPACE_END
