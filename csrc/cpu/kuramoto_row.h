// One row of up to kRowBlock oscillators: its mean field, its steps and their adjoints. Longer rows: kuramoto_long.h.
#pragma once

#include "kuramoto_call.h"
#include "noise.h"
#include "parallel.h"
#include "trig.h"

#include "../math/phase_step.h"
#include "../math/range_reduction.h"

KSSM_NAMESPACE_BEGIN

// An operand along one row.
// Trajectories up to this many steps are kept whole (CHECKPOINT_STEPS in Python).
constexpr int64_t kCheckpointSteps = 64;

template <class T> struct View {
  const T* column;
  T value;
  KSSM_FN Vec<T> at(int64_t j, int64_t n) const { return column ? load(column + j, n - j) : splat<Vec<T>>(value); }
};

template <class T> KSSM_FN View<T> view(const OperandRows& operand, int64_t row) {
  if (!operand.data) return {nullptr, static_cast<T>(operand.value)};
  const T* p = static_cast<const T*>(operand.data) + row * operand.row_stride;
  return operand.column_stride ? View<T>{p, T(0)} : View<T>{nullptr, *p};
}

template <class T> struct Mean {
  T cos, sin;
};

// Zeros in the lanes behind the end of a row of which `left` oscillators remain: they take no part, here or in the adjoint.
template <class V> KSSM_FN void only_live(int64_t left, V& c, V& s) {
  using T = Scalar<V>;
  if (left >= kLanes<T>) return;
  const auto live = ones<T>(left) > T(0);
  c = live ? c : V{};
  s = live ? s : V{};
}

// The operands along one row, and what they make of a vector of oscillators. Made anew in each loop: what is local to it
// stays in registers, while members would be read again after every store.
template <class T> class RowOperands {
 public:
  RowOperands(const KuramotoCall& call, int64_t row)
      : n_(call.n), dt_(splat<Vec<T>>(T(call.dt))), has_omega_(call.has_omega), has_phase_lag_(call.has_phase_lag),
        has_noise_(call.has_noise), coupling_(view<T>(call.operands[kCoupling], row)),
        omega_(view<T>(call.operands[kOmega], row)), phase_lag_(view<T>(call.operands[kPhaseLag], row)),
        noise_scale_(view<T>(call.operands[kNoiseScale], row)) {}

  KSSM_FN Vec<T> dt() const { return dt_; }
  KSSM_FN Vec<T> coupling(int64_t j) const { return coupling_.at(j, n_); }
  // cos and sin of x + lag, from those of x
  KSSM_FN void shift(Vec<T> x, int64_t j, Vec<T>& c, Vec<T>& s) const {
    if (!has_phase_lag_) return;
    const Vec<T> y[1] = {x + phase_lag_.at(j, n_)};
    Vec<T> ys[1], yc[1];
    sincos<T, 1>(y, ys, yc);
    c = yc[0];
    s = ys[0];
  }
  // from + a step; c, s: shifted. xi: the noise of the stretch that begins at oscillator `begin`
  KSSM_FN Vec<T> moved(Vec<T> from, Mean<T> z, Vec<T> c, Vec<T> s, int64_t j, const float* xi, int64_t begin) const {
    Vec<T> velocity = coupling(j) * pull(splat<Vec<T>>(z.cos), splat<Vec<T>>(z.sin), c, s);
    if (has_omega_) velocity = velocity + omega_.at(j, n_);
    const Vec<T> y = fma(dt_, velocity, from);
    return has_noise_ ? fma(-noise_scale_.at(j, n_), load_normals(xi + (j - begin), T(0)), y) : y;
  }

 private:
  const int64_t n_;
  const Vec<T> dt_;
  const bool has_omega_, has_phase_lag_, has_noise_;
  const View<T> coupling_, omega_, phase_lag_, noise_scale_;
};

// Which way the phases of a call's steps are kept: phase_step.h.
template <class T> struct Keeping {
  KSSM_FN explicit Keeping(int64_t steps)
      : steps_(steps), in_two(steps > kPlain), wraps(sizeof(T) == 4 && steps > kUnwrapped) {}
  KSSM_FN bool folds(int64_t step) const { return (step + 1) % kFold == 0 || step + 1 == steps_; }

 private:
  const int64_t steps_;

 public:
  const bool in_two, wraps;
};

// Turns taken off phases in which they cannot be counted.
template <class T> __attribute__((noinline)) inline void reduce_uncountable(T* x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    if (__builtin_fabs(static_cast<double>(x[j])) <= kCountable) continue;
    const Reduced exact = reduce_exact(static_cast<double>(x[j]));
    x[j] = static_cast<T>(exact.r + 1.5707963267948966 * static_cast<double>(exact.q == 3 ? -1 : exact.q));
  }
}

template <class T> class KuramotoRow {
 public:
  // cos, sin: those of the phases last given to mean_field.
  KuramotoRow(const KuramotoCall& call, bool& ok)
      : call_(call), n_(call.n), keeping_(call.steps), cos_(call.n, ok), sin_(call.n, ok),
        base_(keeping_.in_two ? call.n : 0, ok), moved_(keeping_.in_two ? call.n : 0, ok),
        xi_(call.has_noise ? call.n + 127 : 0, ok) {}

  void set_row(int64_t row) { row_ = row; }

  // Before the first step from these phases, if the call's phases are kept in two: with `reduce`, a copy of them that
  // turns can be counted in.
  const T* start(const T* theta, bool reduce) {
    if (!keeping_.in_two) return theta;
    for (int64_t j = 0; j < n_; j += W) store(base_ + j, load(theta + j));
    if (reduce && keeping_.wraps) reduce_uncountable<T>(base_, n_);
    zero<T>(moved_, n_);
    return base_;
  }
  bool stopped() { return call_.watch && call_.watch->stop(n_ / W + 1); }

  Mean<T> mean_field(const T* theta) {
    Vec<T> sum_cos{}, sum_sin{};
    int64_t j = 0;
    for (; j + 2 * W < n_; j += 3 * W) add_unit_vectors<3>(theta, j, sum_cos, sum_sin);
    for (; j < n_; j += W) add_unit_vectors<1>(theta, j, sum_cos, sum_sin);
    return mean(lane_sum<T>(sum_cos), lane_sum<T>(sum_sin));
  }

  // one step from theta, whose mean field z was the last computed; out may be theta
  void advance(const T* theta, Mean<T> z, int64_t step, T* out) {
    if (call_.has_noise) fill_normals(row_, step, call_.seed, 0, n_, xi_);
    const bool folds = keeping_.folds(step);
    const RowOperands<T> operands(call_, row_);
    for (int64_t j = 0; j < n_; j += W) {
      const Vec<T> x = load(theta + j);
      Vec<T> c = load(cos_ + j), s = load(sin_ + j);
      operands.shift(x, j, c, s);
      if (!keeping_.in_two) {
        store(out + j, operands.moved(x, z, c, s, j, xi_, 0));
        continue;
      }
      Vec<T> base = load(base_ + j), y = operands.moved(load(moved_ + j), z, c, s, j, xi_, 0);
      if (folds) {
        fold(base, y, keeping_.wraps);
        store(base_ + j, base);
      }
      store(moved_ + j, y);
      store(out + j, base + y);
    }
  }

  // g: the gradient after the step on entry, before it on return; totals[k] (or null) gains operand k's share.
  void adjoint(const T* theta, Mean<T> z, int64_t step, T* g, T* const* totals) {
    const Vec<T> mean_cos = splat<Vec<T>>(z.cos), mean_sin = splat<Vec<T>>(z.sin);
    if (totals[kNoiseScale]) fill_normals(row_, step, call_.seed, 0, n_, xi_);
    const RowOperands<T> operands(call_, row_);
    Vec<T> sum_cos{}, sum_sin{};
    for (int64_t j = 0; j < n_; j += W) {
      Vec<T> c = load(cos_ + j), s = load(sin_ + j);
      operands.shift(load(theta + j), j, c, s);
      const Vec<T> gj = load(g + j), dt_g = operands.dt() * gj, dt_g_k = dt_g * operands.coupling(j);
      const Vec<T> q = align(mean_cos, mean_sin, c, s);
      sum_cos = sum_cos - dt_g_k * s;
      sum_sin = sum_sin + dt_g_k * c;
      gain(totals[kCoupling], j, dt_g * pull(mean_cos, mean_sin, c, s));
      gain(totals[kOmega], j, dt_g);
      gain(totals[kPhaseLag], j, -(dt_g_k * q));
      if (totals[kNoiseScale]) gain(totals[kNoiseScale], j, -(gj * load_normals(xi_ + j, T(0))));
      store(g + j, own_adjoint(gj, dt_g_k, q));
    }
    const Mean<T> grad = mean(lane_sum<T>(sum_cos), lane_sum<T>(sum_sin));
    const Vec<T> g_cos = splat<Vec<T>>(grad.cos), g_sin = splat<Vec<T>>(grad.sin);
    for (int64_t j = 0; j < n_; j += W)
      store(g + j, mean_field_adjoint(load(g + j), load(cos_ + j), load(sin_ + j), g_cos, g_sin));
  }

  double sum(const T* row) const {
    Vec<T> total{};
    for (int64_t j = 0; j < n_; j += W) total = total + load(row + j, n_ - j);
    return static_cast<double>(lane_sum<T>(total));
  }

 private:
  static constexpr int W = kLanes<T>;

  template <int P> KSSM_FN void add_unit_vectors(const T* theta, int64_t j, Vec<T>& sum_cos, Vec<T>& sum_sin) {
    Vec<T> x[P], s[P], c[P];
    for (int p = 0; p < P; ++p) x[p] = load(theta + j + p * W);
    sincos<T, P>(x, s, c);
    for (int p = 0; p < P; ++p) {
      only_live(n_ - j - p * W, c[p], s[p]);
      store(cos_ + j + p * W, c[p]);
      store(sin_ + j + p * W, s[p]);
      sum_cos = sum_cos + c[p];
      sum_sin = sum_sin + s[p];
    }
  }

  KSSM_FN static void gain(T* total, int64_t j, Vec<T> x) {
    if (total) store(total + j, load(total + j) + x);
  }

  Mean<T> mean(T sum_cos, T sum_sin) const {
    const double n = static_cast<double>(n_);
    return {static_cast<T>(static_cast<double>(sum_cos) / n), static_cast<T>(static_cast<double>(sum_sin) / n)};
  }

  const KuramotoCall& call_;
  const int64_t n_;
  const Keeping<T> keeping_;
  int64_t row_ = 0;
  RowBuffer<T> cos_, sin_, base_, moved_;
  Buffer<float> xi_;
};

KSSM_NAMESPACE_END
