// The products-to-sums of csrc/math/harmonics.h over a run of vectors of phases: stretches of it, "tiles", whose powers
// stay in the first-level cache while every group of harmonics passes over them with its sums (or numbers) in registers.
// The lanes are oscillators of one row, or ensembles: one row each.
#pragma once

#include "memory.h"
#include "transpose.h"
#include "trig.h"

#include "../math/harmonics.h"

KSSM_NAMESPACE_BEGIN

constexpr int kTileVectors = kBytes == 64 ? 32 : 1024 / kBytes;
template <class T> constexpr int64_t kTile = kTileVectors * static_cast<int64_t>(kLanes<T>);

// Where a run's phases come from, kTile at most at a time: one row that may be read up to the next whole vector,
template <class T> struct RowPhases {
  const T* theta;
  const T* operator()(int64_t begin, int64_t) const { return theta + begin; }
};

// or a lane's width of such rows: element begin is in column begin / width.
template <class T> struct LanePhases {
  const T* const* rows;
  Vec<T> columns[kTileVectors];

  explicit LanePhases(const T* const* theta) : rows(theta) {}  // leaves the columns as they are
  const T* operator()(int64_t begin, int64_t count) {
    constexpr int W = kLanes<T>;
    rows_to_lanes<T>([&](int i) { return rows[i] + begin / W; }, count / W, columns);
    return reinterpret_cast<const T*>(columns);
  }
};

// Where the adjoint of a run goes: it is added to a row that may be written up to the next whole vector,
template <class T> struct RowSums {
  T* g;
  KSSM_FN void put(int64_t begin, int j, Vec<T> x) {
    T* out = g + begin + j * static_cast<int64_t>(kLanes<T>);
    store(out, load(out) + x);
  }
  KSSM_FN void flush(int64_t, int) {}
};

// or written to a lane's width of such rows.
template <class T> struct LaneRowsOut {
  T* const* rows;
  Vec<T> columns[kTileVectors];

  explicit LaneRowsOut(T* const* out) : rows(out) {}  // leaves the columns as they are
  KSSM_FN void put(int64_t, int j, Vec<T> x) { columns[j] = x; }
  KSSM_FN void flush(int64_t begin, int vectors) {
    for (int j = vectors; j % kLanes<T>; ++j) columns[j] = Vec<T>{};
    lanes_to_rows<T>(columns, vectors, [&](int i) { return rows[i] + begin / kLanes<T>; });
  }
};

template <class T, int HALF> struct Tile {
  using V = Vec<T>;
  static constexpr bool kGrouped = HALF > 1;  // one harmonic has no groups
  int vectors;
  V c[HALF + 1][kTileVectors], s[HALF + 1][kTileVectors];  // powers 1..A of the phases' cosines and sines (0 unused)
  V twice[kTileVectors];                                   // 2 cos(m theta)
  V storage[4][kTileVectors];
  V *c_b = storage[0], *s_b = storage[1], *c_next = storage[2], *s_next = storage[3];  // at b = m at first, and at b + m

  // Phases may be read up to the next whole vector; lanes behind the row's end get zeros for all cosines and sines.
  template <bool NEXT> void fill(const T* theta, int64_t count) {
    vectors = static_cast<int>(padded<T>(count) / kLanes<T>);
    const int whole = static_cast<int>(count / kLanes<T>);
    const V one[1] = {splat<V>(T(1))}, ones3[3] = {one[0], one[0], one[0]};
    int v = 0;
    for (; v + 2 < whole; v += 3) put<3, NEXT>(theta, v, ones3);
    for (; v < whole; ++v) put<1, NEXT>(theta, v, one);
    if (v < vectors) {
      const V live[1] = {ones<T>(count - v * static_cast<int64_t>(kLanes<T>))};
      put<1, NEXT>(theta, v, live);
    }
  }

 private:
  template <int P, bool NEXT> KSSM_FN void put(const T* theta, int v, const V (&one)[P]) {
    V x[P], sin[P], cos[P];
    for (int p = 0; p < P; ++p) x[p] = load(theta + (v + p) * static_cast<int64_t>(kLanes<T>));
    sincos<T, P>(x, sin, cos);
    for (int p = 0; p < P; ++p, ++v) {
      V a[HALF + 2], b[HALF + 2];
      const auto live = one[p] > T(0);
      a[1] = live ? cos[p] : V{};  // folded away where `one` is a constant
      b[1] = live ? sin[p] : V{};
      powers<HALF + kGrouped>(a, b);
#pragma GCC unroll 8
      for (int k = 1; k <= HALF; ++k) {
        c[k][v] = a[k];
        s[k][v] = b[k];
      }
      if (!kGrouped) continue;
      const V cm = fma(a[HALF], a[HALF + 1], -(b[HALF] * b[HALF + 1]));
      const V sm = fma(b[HALF], a[HALF + 1], a[HALF] * b[HALF + 1]);
      c_b[v] = cm;
      s_b[v] = sm;
      // The products leave cm + i sm some ulp off the unit circle, which the recurrence would amplify (H/m)^2 times:
      // its coefficient is put back on it.
      const V excess = fma(sm, sm, fma(cm, cm, -one[p]));
      twice[v] = fma(-cm, excess, cm + cm);
      if (NEXT) {
        c_next[v] = fma(twice[v], cm, -one[p]);
        s_next[v] = twice[v] * sm;
      }
    }
  }
};

// Loads once what two instructions read: GCC folds the load into both, and the loops below are bound by their loads
// (Zen 1, adjoint of 32 harmonics: 146 cycles per vector, 140 with this).
template <class V> KSSM_FN V in_register(V x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#endif
  return x;
}

template <class V> KSSM_FN void swap(V*& a, V*& b) {
  V* const t = a;
  a = b;
  b = t;
}

// sums += a group's products with the powers a .. a + PAIR - 1. FIRST: its c_b and s_b too. ADVANCE: leave the values at
// b + 2m in the place of those at b.
template <int PAIR, bool FIRST, bool ADVANCE, class T, int HALF>
KSSM_FN void add_products(Tile<T, HALF>& tile, int a, Vec<T>* sums) {
  using V = Vec<T>;
  V cc[PAIR], ss[PAIR], cs[PAIR], sc[PAIR], sum_c = sums[0], sum_s = sums[1];
#pragma GCC unroll 2
  for (int i = 0; i < PAIR; ++i) {
    const V* row = sums + 4 * (a + i) - 2;
    cc[i] = row[0];
    ss[i] = row[1];
    cs[i] = row[2];
    sc[i] = row[3];
  }
  V *c_b = tile.c_b, *s_b = tile.s_b;
  const V *c_next = tile.c_next, *s_next = tile.s_next;
#pragma GCC unroll 2
  for (int v = 0; v < tile.vectors; ++v) {
    const V cb = c_b[v], sb = s_b[v];
    if (FIRST) {
      sum_c = sum_c + cb;
      sum_s = sum_s + sb;
    }
#pragma GCC unroll 2
    for (int i = 0; i < PAIR; ++i) {
      const V ca = in_register(tile.c[a + i][v]), sa = in_register(tile.s[a + i][v]);
      cc[i] = fma(cb, ca, cc[i]);
      ss[i] = fma(sb, sa, ss[i]);
      cs[i] = fma(cb, sa, cs[i]);
      sc[i] = fma(sb, ca, sc[i]);
    }
    if (ADVANCE) {
      const V twice = in_register(tile.twice[v]);
      c_b[v] = fma(twice, c_next[v], -cb);
      s_b[v] = fma(twice, s_next[v], -sb);
    }
  }
  if (FIRST) {
    sums[0] = sum_c;
    sums[1] = sum_s;
  }
#pragma GCC unroll 2
  for (int i = 0; i < PAIR; ++i) {
    V* row = sums + 4 * (a + i) - 2;
    row[0] = cc[i];
    row[1] = ss[i];
    row[2] = cs[i];
    row[3] = sc[i];
  }
}

// The forward's sums of n elements, lane by lane.
template <class T, int HALF, class Phases> inline void add_run(Phases& phases, int64_t n, int groups, Vec<T>* sums) {
  constexpr int PAIR = HALF < 2 ? 1 : 2, per_group = 4 * HALF + 2;
  Tile<T, HALF> tile;
  for (int64_t begin = 0; begin < n; begin += kTile<T>) {
    const int64_t count = n - begin < kTile<T> ? n - begin : kTile<T>;
    tile.template fill<true>(phases(begin, count), count);
    for (int a = 1; a <= HALF; ++a) {
      Vec<T> sum_c = sums[4 * a - 2], sum_s = sums[4 * a];
      for (int v = 0; v < tile.vectors; ++v) {
        sum_c = sum_c + tile.c[a][v];
        sum_s = sum_s + tile.s[a][v];
      }
      sums[4 * a - 2] = sum_c;
      sums[4 * a] = sum_s;
    }
    for (int k = 1; k <= groups; ++k) {
      Vec<T>* row = sums + k * per_group;
      const bool advance = k + 2 <= groups;
      if (HALF == PAIR && advance) add_products<PAIR, true, true>(tile, 1, row);
      else add_products<PAIR, true, false>(tile, 1, row);
      for (int a = 1 + PAIR; a + PAIR <= HALF; a += PAIR) add_products<PAIR, false, false>(tile, a, row);
      if (HALF > PAIR && advance) add_products<PAIR, false, true>(tile, HALF - PAIR + 1, row);
      else if (HALF > PAIR) add_products<PAIR, false, false>(tile, HALF - PAIR + 1, row);
      swap(tile.c_b, tile.c_next);
      swap(tile.s_b, tile.s_next);
    }
  }
}

// A number of the row, or of each lane's row.
template <class V> KSSM_FN V wide(Scalar<V> x) { return splat<V>(x); }
template <class V> KSSM_FN V wide(V x) { return x; }

// One step of Clenshaw's recurrence in m theta with a group's numbers: u_new = X + 2 cos(m theta) u - u_old, and v with Y.
// START: u, v, u_old and v_old are zero and not read.
template <int PAIR, bool START, bool FIRST, bool LAST, class T, int HALF, class Numbers>
KSSM_FN void add_group(const Tile<T, HALF>& tile, int a, const Numbers* numbers, const Vec<T>* u, const Vec<T>* v,
                       Vec<T>* u_old, Vec<T>* v_old) {
  using V = Vec<T>;
  V xc[PAIR], xs[PAIR], yc[PAIR], ys[PAIR];
  const V x0 = wide<V>(numbers[0]), y0 = wide<V>(numbers[1]);
#pragma GCC unroll 2
  for (int i = 0; i < PAIR; ++i) {
    const Numbers* row = numbers + 4 * (a + i) - 2;
    xc[i] = wide<V>(row[0]);
    xs[i] = wide<V>(row[1]);
    yc[i] = wide<V>(row[2]);
    ys[i] = wide<V>(row[3]);
  }
  for (int j = 0; j < tile.vectors; ++j) {
    V x = !FIRST ? u_old[j] : START ? x0 : x0 - u_old[j], y = !FIRST ? v_old[j] : START ? y0 : y0 - v_old[j];
#pragma GCC unroll 2
    for (int i = 0; i < PAIR; ++i) {
      const V ca = in_register(tile.c[a + i][j]), sa = in_register(tile.s[a + i][j]);
      x = fma(xc[i], ca, x);
      y = fma(yc[i], ca, y);
      x = fma(xs[i], sa, x);
      y = fma(ys[i], sa, y);
    }
    const V twice = LAST && !START ? in_register(tile.twice[j]) : V{};
    u_old[j] = LAST && !START ? fma(twice, u[j], x) : x;
    v_old[j] = LAST && !START ? fma(twice, v[j], y) : y;
  }
}

template <bool START, class T, int HALF, class Numbers>
KSSM_FN void add_groups(const Tile<T, HALF>& tile, const Numbers* row, const Vec<T>* u, const Vec<T>* v, Vec<T>* u_old,
                        Vec<T>* v_old) {
  constexpr int PAIR = HALF < 2 ? 1 : 2;
  add_group<PAIR, START, true, HALF == PAIR>(tile, 1, row, u, v, u_old, v_old);
  for (int a = 1 + PAIR; a + PAIR <= HALF; a += PAIR)
    add_group<PAIR, START, false, false>(tile, a, row, u, v, u_old, v_old);
  if (HALF > PAIR) add_group<PAIR, START, false, true>(tile, HALF - PAIR + 1, row, u, v, u_old, v_old);
}

// out gets sum_n p_n cos(n theta_j) + q_n sin(n theta_j), p and q as group_numbers lays them out.
template <class T, int HALF, class Phases, class Out, class Numbers>
inline void adjoint_run(Phases& phases, int64_t n, int groups, const Numbers* numbers, Out& out) {
  constexpr int per_group = 4 * HALF + 2;
  using V = Vec<T>;
  Tile<T, HALF> tile;
  V storage[4][kTileVectors];
  V *u = storage[0], *v = storage[1], *u_old = storage[2], *v_old = storage[3];
  for (int64_t begin = 0; begin < n; begin += kTile<T>) {
    const int64_t count = n - begin < kTile<T> ? n - begin : kTile<T>;
    tile.template fill<false>(phases(begin, count), count);
    for (int j = 0; j < tile.vectors; ++j) u[j] = v[j] = V{};
    if (groups == 0)  // otherwise the first step writes them
      for (int j = 0; j < tile.vectors; ++j) u_old[j] = v_old[j] = V{};
    for (int k = groups; k >= 1; --k) {
      if (k == groups) add_groups<true>(tile, numbers + k * per_group, u, v, u_old, v_old);
      else add_groups<false>(tile, numbers + k * per_group, u, v, u_old, v_old);
      swap(u, u_old);
      swap(v, v_old);
    }
    for (int j = 0; j < tile.vectors; ++j) {
      V x = tile.kGrouped ? fma(u[j], tile.c_b[j], fma(v[j], tile.s_b[j], -u_old[j])) : V{};
#pragma GCC unroll 8
      for (int a = 1; a <= HALF; ++a) {
        x = fma(wide<V>(numbers[4 * a - 2]), tile.c[a][j], x);
        x = fma(wide<V>(numbers[4 * a - 1]), tile.s[a][j], x);
      }
      out.put(begin, j, x);
    }
    out.flush(begin, tile.vectors);
  }
}

KSSM_NAMESPACE_END
