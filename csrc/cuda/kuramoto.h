// One thread's eight oscillators of a row, their step and its adjoint. Equations: kssm_kernels/ops/kuramoto/__init__.py.
#pragma once

#include "team.h"

#include "../math/philox.h"
#include "../math/phase_step.h"
#include "../math/sincos_any.h"

KSSM_NAMESPACE_BEGIN

// How a call keeps its phases between its steps (phase_step.h); kssm_kernels/ops/kuramoto/_gpu.py has the same numbers.
constexpr int64_t kWhole = 0, kInTwo = 1, kWrapping = 2;

constexpr int kItems = 8;

// Which elements of a row or row block are the thread's: runs of V, so that 128 bits are loaded at once.
template <int V> struct Items {
  int count;  // elements of the row or row block; 0: the team has none
  int lanes, rank;

  KSSM_DEVICE int at(int run) const { return (run * lanes + rank) * V; }
  KSSM_DEVICE int position(int k) const { return at(k / V) + k % V; }
  KSSM_DEVICE bool live(int k) const { return position(k) < count; }
  KSSM_DEVICE unsigned live_bits() const {
    unsigned mask = 0;
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) mask |= live(k) ? 1u << k : 0u;
    return mask;
  }

  template <class S> KSSM_DEVICE void load_from(const S* p, int64_t stride, Compute<S> (&x)[kItems]) const {
    KSSM_UNROLL
    for (int run = 0; run < kItems / V; ++run) {
      Compute<S> part[V];
      load_run(p + at(run) * stride, stride, count - at(run), part);
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) x[run * V + v] = part[v];
    }
  }
  template <class S> KSSM_DEVICE void store_to(S* p, const Compute<S> (&x)[kItems]) const {
    KSSM_UNROLL
    for (int run = 0; run < kItems / V; ++run) {
      Compute<S> part[V];
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) part[v] = x[run * V + v];
      store_run(p + at(run), count - at(run), part);
    }
  }
};

// The normal of oscillator j in one row and step, as kssm_kernels/noise.py has it.
KSSM_DEVICE float normal_at(uint64_t seed, int64_t step, int64_t row, int64_t j) {
  const uint64_t block = static_cast<uint64_t>(j / kNoiseGroup * kNoiseLanes + j % kNoiseLanes);
  const int word = static_cast<int>(j % kNoiseGroup) / kNoiseLanes;
  const uint64_t r = static_cast<uint64_t>(row);
  uint64_t c[4] = {block, static_cast<uint64_t>(step), r, r >> 32};
  philox_4x32(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint32_t w0 = static_cast<uint32_t>(word < 2 ? c[0] : c[2]), w1 = static_cast<uint32_t>(word < 2 ? c[1] : c[3]);
  float first, second;
  box_muller<float>(static_cast<int32_t>(w0 >> 8), static_cast<int32_t>((w1 >> 6) & 0xffffffu),
                    static_cast<int32_t>(w1 >> 30), [](int32_t i) { return static_cast<float>(i); }, first, second);
  return word % 2 ? second : first;
}

template <class T> struct Mean {
  T cos, sin;
};

// Gradients of the four operands, summed over the steps; what nobody wants is never touched.
template <class T> struct Totals {
  T coupling[kItems], omega[kItems], phase_lag[kItems], noise_scale[kItems];

  KSSM_DEVICE void clear() {
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) coupling[k] = omega[k] = phase_lag[k] = noise_scale[k] = T(0);
  }
};

template <class T, int V> class Row {
 public:
  // begin: of a row block in its row
  KSSM_DEVICE Row(const KuramotoUpdate& call, int64_t row, int64_t begin, const Items<V>& items)
      : items(items), call_(call), row_(row), begin_(begin) {}

  // Cosines and sines of the phases; zeros for elements that are not there.
  KSSM_DEVICE void unit_vectors(const T (&x)[kItems], T (&c)[kItems], T (&s)[kItems]) const {
    sincos_any(x, s, c);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) {
      c[k] = items.live(k) ? c[k] : T(0);
      s[k] = items.live(k) ? s[k] : T(0);
    }
  }

  // `to` gains a step from phases x, whose cosines and sines are c and s; it may be x.
  KSSM_DEVICE void advance(const T (&x)[kItems], const T (&c)[kItems], const T (&s)[kItems], Mean<T> z, int64_t step,
                           T (&to)[kItems]) const {
    T ca[kItems], sa[kItems], velocity[kItems];
    shifted(x, c, s, ca, sa);
    get(call_.coupling, velocity);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) velocity[k] = velocity[k] * pull(z.cos, z.sin, ca[k], sa[k]);
    if (call_.omega.present) {
      T omega[kItems];
      get(call_.omega, omega);
      KSSM_UNROLL
      for (int k = 0; k < kItems; ++k) velocity[k] = velocity[k] + omega[k];
    }
    const T dt = static_cast<T>(call_.dt);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) to[k] = fma(dt, velocity[k], to[k]);
    if (!call_.noise_scale.present) return;
    T scale[kItems];
    get(call_.noise_scale, scale);
    for_normals(step, [&](T xi, int i, bool mine) { to[i] = mine ? fma(-scale[i], xi, to[i]) : to[i]; });
  }

  // The cosines and sines that the mean field pulls at.
  KSSM_DEVICE void shifted(const T (&x)[kItems], const T (&c)[kItems], const T (&s)[kItems], T (&ca)[kItems],
                           T (&sa)[kItems]) const {
    if (call_.phase_lag.present) {
      get(call_.phase_lag, ca);
      KSSM_UNROLL
      for (int k = 0; k < kItems; ++k) sa[k] = x[k] + ca[k];
      sincos_any(sa, sa, ca);
      return;
    }
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) {
      ca[k] = c[k];
      sa[k] = s[k];
    }
  }

  // What the gradient g after a step, times dt and K, gives to the mean field: gC and gS, not yet divided by N.
  KSSM_DEVICE Mean<T> mean_gradient(const T (&g)[kItems], const T (&ca)[kItems], const T (&sa)[kItems]) const {
    T strength[kItems];
    get(call_.coupling, strength);
    Mean<T> sum{T(0), T(0)};
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) {
      const T dt_g_k = static_cast<T>(call_.dt) * g[k] * strength[k];
      sum.cos = sum.cos - dt_g_k * sa[k];
      sum.sin = sum.sin + dt_g_k * ca[k];
    }
    return sum;
  }

  // g: the gradient after the step on entry, before it on return; c, s and ca, sa: of the phases before the step.
  KSSM_DEVICE void adjoint(const T (&c)[kItems], const T (&s)[kItems], const T (&ca)[kItems], const T (&sa)[kItems],
                           Mean<T> z, Mean<T> gz, int64_t step, const Target* targets, T (&g)[kItems],
                           Totals<T>& totals) const {
    if (targets[3].data) {
      T* const noise = totals.noise_scale;
      for_normals(step, [&](T xi, int i, bool mine) { noise[i] = mine ? noise[i] - g[i] * xi : noise[i]; });
    }
    T strength[kItems];
    get(call_.coupling, strength);
    const T dt = static_cast<T>(call_.dt);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) {
      const T dt_g = dt * g[k], dt_g_k = dt_g * strength[k], q = align(z.cos, z.sin, ca[k], sa[k]);
      if (targets[0].data) totals.coupling[k] = totals.coupling[k] + dt_g * pull(z.cos, z.sin, ca[k], sa[k]);
      if (targets[1].data) totals.omega[k] = totals.omega[k] + dt_g;
      if (targets[2].data) totals.phase_lag[k] = totals.phase_lag[k] - dt_g_k * q;
      g[k] = mean_field_adjoint(own_adjoint(g[k], dt_g_k, q), c[k], s[k], gz.cos, gz.sin);
    }
  }

  const Items<V> items;

 private:
  // f(normal of oscillator k, i, i == k) for all k and i: the normals one after another, for their code is long and
  // eight times as long it would not fit the instruction cache; all i, for arrays in registers have no variable index.
  template <class F> KSSM_DEVICE void for_normals(int64_t step, const F& f) const {
    KSSM_ROLLED
    for (int k = 0; k < kItems; ++k) {
      const T xi = static_cast<T>(normal_at(call_.seed, step, row_, begin_ + items.position(k)));
      KSSM_UNROLL
      for (int i = 0; i < kItems; ++i) f(xi, i, i == k);
    }
  }

  // Read anew whenever it is needed: the cache has it, and the registers have not.
  KSSM_DEVICE void get(const Operand& operand, T (&x)[kItems]) const {
    const T* const p = reinterpret_cast<const T*>(operand.data) + row_ * operand.row_stride;
    if (operand.data && operand.column_stride) {
      items.template load_from<T>(p + begin_ * operand.column_stride, operand.column_stride, x);
      return;
    }
    const T value = operand.data ? (items.count > 0 ? load(p) : T(0)) : static_cast<T>(operand.value);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) x[k] = value;
  }

  const KuramotoUpdate& call_;
  const int64_t row_, begin_;
};

// Steps of a whole row from number `first` on: x before them becomes x after them. keep(step, phases) sees the phases
// after each. PARTS: 1, or 2 where x + moved is the phase, and whole turns are taken off x with `wrap`; what is left in
// `moved` behind the last step is below an ulp of x, and dropped. A kernel for each: one for both has more registers in
// use, and spilled 80 bytes of the short calls' where they have 128.
template <int PARTS, class T, int V, class Keep>
KSSM_DEVICE void take_steps(const Team& team, const Row<T, V>& row, int64_t n, int64_t first, int64_t steps, bool wrap,
                            T (&x)[kItems], T* warps, int& turn, const Keep& keep) {
  const T count = static_cast<T>(n);
  T moved[kItems];
  KSSM_UNROLL
  for (int k = 0; k < kItems; ++k) moved[k] = T(0);
  for (int64_t step = 0; step < steps; ++step) {
    T theta[kItems], c[kItems], s[kItems], sums[2] = {T(0), T(0)};
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) theta[k] = PARTS == 2 ? x[k] + moved[k] : x[k];
    row.unit_vectors(theta, c, s);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) {
      sums[0] += c[k];
      sums[1] += s[k];
    }
    team_sum(team, sums, warps, turn);
    const Mean<T> z{sums[0] / count, sums[1] / count};
    if constexpr (PARTS == 2) {
      row.advance(theta, c, s, z, first + step, moved);
      if ((step + 1) % kFold == 0 || step + 1 == steps) {
        KSSM_UNROLL
        for (int k = 0; k < kItems; ++k) fold(x[k], moved[k], wrap);
      }
      KSSM_UNROLL
      for (int k = 0; k < kItems; ++k) theta[k] = x[k] + moved[k];
      keep(step, theta);
    } else {
      row.advance(theta, c, s, z, first + step, x);
      keep(step, x);
    }
  }
}

KSSM_NAMESPACE_END
