// One row of oscillators: its mean field, its steps and their adjoints, over vectors, and over blocks if the row is long.
#pragma once

#include "kernels.h"
#include "noise.h"
#include "parallel.h"
#include "trig.h"

#include "../math/phase_step.h"

KSSM_NAMESPACE_BEGIN

// An operand along one row.
template <class T> struct View {
  const T* column;
  T value;
  KSSM_FN Vec<T> at(int64_t j, int64_t n) const { return column ? load(column + j, n - j) : splat<Vec<T>>(value); }
};

template <class T> KSSM_FN View<T> view(const Operand& operand, int64_t row) {
  if (!operand.data) return {nullptr, static_cast<T>(operand.value)};
  const T* p = static_cast<const T*>(operand.data) + row * operand.row_stride;
  return operand.column_stride ? View<T>{p, T(0)} : View<T>{nullptr, *p};
}

template <class T> struct Mean {
  T cos, sin;
};

template <class T> class KuramotoRow {
 public:
  // threads: those that share the blocks of one row. cos, sin: those of the phases last given to mean_field.
  KuramotoRow(const KuramotoCall& call, int threads, bool& ok)
      : call_(call), n_(call.n), blocks_((call.n + kBlock - 1) / kBlock), threads_(threads), cos_(call.n, ok),
        sin_(call.n, ok), xi_(call.has_noise ? call.n + 127 : 0, ok), partial_(2 * blocks_, ok) {}

  void set_row(int64_t row) {
    row_ = row;
    coupling_ = view<T>(call_.operands[kCoupling], row);
    omega_ = view<T>(call_.operands[kOmega], row);
    lag_ = view<T>(call_.operands[kLag], row);
    noise_ = view<T>(call_.operands[kNoise], row);
  }

  // f(begin, end) over the row's blocks
  template <class F> void for_blocks(const F& f) const {
    parallel_for(blocks_, threads_, [&](int64_t b) { f(b * kBlock, (b + 1) * kBlock < n_ ? (b + 1) * kBlock : n_); });
  }

  Mean<T> mean_field(const T* theta) {
    for_blocks([&](int64_t begin, int64_t end) {
      Vec<T> sum_cos{}, sum_sin{};
      int64_t j = begin;
      for (; j + 2 * W < end; j += 3 * W) add_unit_vectors<3>(theta, j, sum_cos, sum_sin);
      for (; j < end; j += W) add_unit_vectors<1>(theta, j, sum_cos, sum_sin);
      put_partial(begin, lane_sum<T>(sum_cos), lane_sum<T>(sum_sin));
    });
    return mean();
  }

  // one step from theta, whose mean field z was the last computed; out may be theta
  void advance(const T* theta, Mean<T> z, int64_t step, T* out) {
    const Vec<T> mean_cos = splat<Vec<T>>(z.cos), mean_sin = splat<Vec<T>>(z.sin), dt = splat<Vec<T>>(T(call_.dt));
    for_blocks([&](int64_t begin, int64_t end) {
      if (call_.has_noise) fill_normals(row_, step, call_.seed, begin, end - begin, xi_ + begin);
      for (int64_t j = begin; j < end; j += W) {
        const Vec<T> x = load(theta + j);
        Vec<T> c, s;
        shifted(x, j, c, s);
        Vec<T> velocity = coupling_.at(j, n_) * pull(mean_cos, mean_sin, c, s);
        if (call_.has_omega) velocity = velocity + omega_.at(j, n_);
        Vec<T> y = fma(dt, velocity, x);
        if (call_.has_noise) y = fma(-noise_.at(j, n_), load_normals(xi_ + j, T(0)), y);
        store(out + j, y);
      }
    });
  }

  // g: the gradient after the step on entry, before it on return; totals[k] (or null) gains operand k's share.
  void adjoint(const T* theta, Mean<T> z, int64_t step, T* g, T* const* totals) {
    const Vec<T> mean_cos = splat<Vec<T>>(z.cos), mean_sin = splat<Vec<T>>(z.sin), dt = splat<Vec<T>>(T(call_.dt));
    for_blocks([&](int64_t begin, int64_t end) {
      if (totals[kNoise]) fill_normals(row_, step, call_.seed, begin, end - begin, xi_ + begin);
      Vec<T> sum_cos{}, sum_sin{};
      for (int64_t j = begin; j < end; j += W) {
        Vec<T> c, s;
        shifted(load(theta + j), j, c, s);
        const Vec<T> gj = load(g + j), dt_g = dt * gj, dt_g_k = dt_g * coupling_.at(j, n_);
        const Vec<T> q = align(mean_cos, mean_sin, c, s);
        sum_cos = sum_cos - dt_g_k * s;
        sum_sin = sum_sin + dt_g_k * c;
        gain(totals[kCoupling], j, dt_g * pull(mean_cos, mean_sin, c, s));
        gain(totals[kOmega], j, dt_g);
        gain(totals[kLag], j, -(dt_g_k * q));
        if (totals[kNoise]) gain(totals[kNoise], j, -(gj * load_normals(xi_ + j, T(0))));
        store(g + j, own_adjoint(gj, dt_g_k, q));
      }
      put_partial(begin, lane_sum<T>(sum_cos), lane_sum<T>(sum_sin));
    });
    const Mean<T> grad = mean();
    const Vec<T> g_cos = splat<Vec<T>>(grad.cos), g_sin = splat<Vec<T>>(grad.sin);
    for_blocks([&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += W)
        store(g + j, mean_field_adjoint(load(g + j), load(cos_ + j), load(sin_ + j), g_cos, g_sin));
    });
  }

  // sum of a row in double, in the order of its blocks
  double sum(const T* row) {
    for_blocks([&](int64_t begin, int64_t end) {
      Vec<T> total{};
      for (int64_t j = begin; j < end; j += W) total = total + load(row + j, n_ - j);
      put_partial(begin, lane_sum<T>(total), T(0));
    });
    double total = 0.0;
    for (int64_t b = 0; b < blocks_; ++b) total += partial_[2 * b];
    return total;
  }

 private:
  static constexpr int W = kLanes<T>;

  template <int P> KSSM_FN void add_unit_vectors(const T* theta, int64_t j, Vec<T>& sum_cos, Vec<T>& sum_sin) {
    Vec<T> x[P], s[P], c[P];
    for (int p = 0; p < P; ++p) x[p] = load(theta + j + p * W);
    sincos<T, P>(x, s, c);
    for (int p = 0; p < P; ++p) {
      const int64_t left = n_ - j - p * W;
      if (left < W) {  // the lanes behind the row's end take no part, here or in the adjoint
        const auto live = ones<T>(left) > T(0);
        c[p] = live ? c[p] : Vec<T>{};
        s[p] = live ? s[p] : Vec<T>{};
      }
      store(cos_ + j + p * W, c[p]);
      store(sin_ + j + p * W, s[p]);
      sum_cos = sum_cos + c[p];
      sum_sin = sum_sin + s[p];
    }
  }

  KSSM_FN void shifted(Vec<T> x, int64_t j, Vec<T>& c, Vec<T>& s) const {
    if (call_.has_lag) {
      const Vec<T> y[1] = {x + lag_.at(j, n_)};
      Vec<T> ys[1], yc[1];
      sincos<T, 1>(y, ys, yc);
      c = yc[0];
      s = ys[0];
    } else {
      c = load(cos_ + j);
      s = load(sin_ + j);
    }
  }

  KSSM_FN static void gain(T* total, int64_t j, Vec<T> x) {
    if (total) store(total + j, load(total + j) + x);
  }

  KSSM_FN void put_partial(int64_t begin, T a, T b) {
    partial_[begin / kBlock * 2] = static_cast<double>(a);
    partial_[begin / kBlock * 2 + 1] = static_cast<double>(b);
  }

  Mean<T> mean() const {
    double a = 0.0, b = 0.0;
    for (int64_t k = 0; k < blocks_; ++k) {
      a += partial_[2 * k];
      b += partial_[2 * k + 1];
    }
    return {static_cast<T>(a / static_cast<double>(n_)), static_cast<T>(b / static_cast<double>(n_))};
  }

  const KuramotoCall& call_;
  const int64_t n_, blocks_;
  const int threads_;
  int64_t row_ = 0;
  View<T> coupling_{}, omega_{}, lag_{}, noise_{};
  RowBuffer<T> cos_, sin_;
  Buffer<float> xi_;
  Buffer<double> partial_;
};

KSSM_NAMESPACE_END
