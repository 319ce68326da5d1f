// One row of more than kBlock oscillators, which all threads share block by block. Each pass over the row takes one step
// and the sums of the next. The cosines and sines of a row that fits a second-level cache are kept between passes; of a
// longer one they are computed again, for its memory takes longer to read than they do to compute.
#pragma once

#include "kuramoto_row.h"

KSSM_NAMESPACE_BEGIN

template <class T> class LongRow {
 public:
  LongRow(const KuramotoCall& call, int threads, bool& ok)
      : call_(call), n_(call.n), blocks_((call.n + kBlock - 1) / kBlock), threads_(threads), keeping_(call.steps),
        keeps_(call.n * static_cast<int64_t>(sizeof(T)) <= kKeptUnits), cos_(keeps_ ? call.n : 1, ok),
        sin_(keeps_ ? call.n : 1, ok), partial_(kSums * blocks_, ok) {}

  const Keeping<T>& keeping() const { return keeping_; }
  void set_row(int64_t row) { row_ = row; }
  bool stopped() const { return call_.watch && call_.watch->stopped(); }

  // f(begin, end) over the row's blocks
  template <class F> void for_blocks(const F& f) const {
    parallel_for(
        blocks_, threads_, [&](int64_t b) { f(b * kBlock, (b + 1) * kBlock < n_ ? (b + 1) * kBlock : n_); },
        call_.watch);
  }

  // The phases of a row in whole vectors: where they lie, or in `copy`; always a copy, that turns can be counted in, if
  // they are to be kept in two.
  const T* start(const void* theta, int64_t stride, T* copy, T* moved) const {
    const bool in_place = !keeping_.in_two && whole_vectors<T>(call_.code, stride, n_);
    if (in_place) return static_cast<const T*>(theta);
    for_blocks([&](int64_t begin, int64_t end) {
      load_row<T>(call_.code, element(theta, call_.code, begin * stride), stride, end - begin, copy + begin);
      if (keeping_.wraps) reduce_uncountable<T>(copy + begin, end - begin);
      if (keeping_.in_two) zero<T>(moved + begin, end - begin);
    });
    return copy;
  }

  Mean<T> mean_field(const T* theta) {
    for_blocks([&](int64_t block, int64_t block_end) {
      Sums sums;
      for_tiles(block, block_end, [&](int64_t begin, int64_t end) {
        Tile cos, sin;
        unit_vectors(theta + begin, end - begin, cos, sin);
        add_up(begin, end, cos, sin, sums);
      });
      put_sums(block, sums);
    });
    return mean();
  }

  // One step from `from`, whose mean field is z, to base `to` (which may be its own) and its own moved; the phases after
  // it also to `phases`, unless null. With NEXT returns the mean field after the step, and the phases before it must be
  // those whose mean field was taken last.
  template <bool NEXT>
  Mean<T> advance(const T* from, T* moved, Mean<T> z, int64_t step, bool folds, T* to, T* phases) {
    for_blocks([&](int64_t block, int64_t block_end) {
      alignas(64) float xi[kBlock + 127];
      if (call_.has_noise) fill_normals(row_, step, call_.seed, block, block_end - block, xi);
      Sums sums;
      for_tiles(block, block_end, [&](int64_t begin, int64_t end) {
        const RowOperands<T> operands(call_, row_);
        Tile x, next, cos, sin;
        for (int64_t j = begin; j < end; j += W)
          store(x + (j - begin), moved ? load(from + j) + load(moved + j) : load(from + j));
        const T* const c = NEXT && keeps_ ? cos_ + begin : cos;
        const T* const s = NEXT && keeps_ ? sin_ + begin : sin;
        if (!(NEXT && keeps_)) unit_vectors(x, end - begin, cos, sin);
        for (int64_t j = begin; j < end; j += W) {
          const int64_t i = j - begin;
          const Vec<T> here = load(x + i);
          Vec<T> lag_c = load(c + i), lag_s = load(s + i), there;
          operands.shift(here, j, lag_c, lag_s);
          if (!moved) {
            there = operands.moved(here, z, lag_c, lag_s, j, xi, block);
            if (to) store(to + j, there);
          } else {
            Vec<T> base = load(from + j);
            Vec<T> y = operands.moved(load(moved + j), z, lag_c, lag_s, j, xi, block);
            if (folds) fold(base, y, keeping_.wraps);
            if (to && (folds || to != from)) store(to + j, base);
            store(moved + j, y);
            there = base + y;
          }
          if (phases) store(phases + j, there);
          if (NEXT) store(next + i, there);
        }
        if (!NEXT) return;
        if (keeps_) unit_vectors(next, end - begin, cos, sin);
        else turn(x, next, end - begin, cos, sin);
        add_up(begin, end, cos, sin, sums);
      });
      if (NEXT) put_sums(block, sums);
    });
    return NEXT ? mean() : Mean<T>{};
  }

  // Where the gradients of the operands add up: arrays of whole vectors, or numbers (see `scalars`); null: not wanted.
  struct Totals {
    T* columns[kOperands];
    bool summed[kOperands];
  };

  // The adjoint of one step from the phases `theta`, whose mean field is z. g: the gradient at the phases `after` it,
  // still without what the step after that gives to their mean field (`after_gradient`; `after` null: nothing); on return
  // the gradient before the step, likewise without the mean field's part, which is returned.
  Mean<T> adjoint(const T* theta, Mean<T> z, int64_t step, const T* after, Mean<T> after_gradient, T* g,
                  const Totals& totals) {
    for_blocks([&](int64_t block, int64_t block_end) {
      alignas(64) float xi[kBlock + 127];
      const bool noise = totals.columns[kNoise] || totals.summed[kNoise];
      if (noise) fill_normals(row_, step, call_.seed, block, block_end - block, xi);
      Sums sums;
      Vec<T> scalars[kOperands] = {};
      const Vec<T> mean_cos = splat<Vec<T>>(z.cos), mean_sin = splat<Vec<T>>(z.sin);
      for_tiles(block, block_end, [&](int64_t begin, int64_t end) {
        Tile cos, sin;
        unit_vectors(theta + begin, end - begin, cos, sin);
        if (after) add_mean_field(theta, after, after_gradient, begin, end, cos, sin, g);
        if (keeps_) keep(begin, end, cos, sin);
        const RowOperands<T> operands(call_, row_);
        Vec<T> sum_cos = sums.cos, sum_sin = sums.sin;
        for (int64_t j = begin; j < end; j += W) {
          const int64_t i = j - begin;
          Vec<T> c = load(cos + i), s = load(sin + i);
          operands.shift(load(theta + j), j, c, s);
          const Vec<T> gj = load(g + j), dt_g = operands.dt() * gj, dt_g_k = dt_g * operands.coupling(j);
          const Vec<T> q = align(mean_cos, mean_sin, c, s);
          Vec<T> sine = dt_g_k * s, cosine = dt_g_k * c;
          only_live(n_ - j, sine, cosine);
          sum_cos = sum_cos - sine;
          sum_sin = sum_sin + cosine;
          gain(totals, kCoupling, j, dt_g * pull(mean_cos, mean_sin, c, s), scalars);
          gain(totals, kOmega, j, dt_g, scalars);
          gain(totals, kLag, j, -(dt_g_k * q), scalars);
          if (noise) gain(totals, kNoise, j, -(gj * load_normals(xi + (j - block), T(0))), scalars);
          store(g + j, own_adjoint(gj, dt_g_k, q));
        }
        sums = {sum_cos, sum_sin};
      });
      put_sums(block, sums);
      for (int k = kCoupling; k < kOperands; ++k)
        if (totals.summed[k]) partial_[block / kBlock * kSums + 1 + k] += static_cast<double>(lane_sum<T>(scalars[k]));
    });
    return mean();
  }

  // What is left to do at the first phases.
  void finish(const T* theta, Mean<T> gradient, T* g) {
    for_blocks([&](int64_t block, int64_t block_end) {
      for_tiles(block, block_end, [&](int64_t begin, int64_t end) {
        Tile cos, sin;
        if (!keeps_) unit_vectors(theta + begin, end - begin, cos, sin);
        add_mean_field(theta, theta, gradient, begin, end, cos, sin, g);
      });
    });
  }

  void clear_scalars() {
    for (int64_t i = 0; i < kSums * blocks_; ++i) partial_[i] = 0.0;
  }
  // an operand's gradient summed over the row and the steps since
  double scalar(int k) const {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks_; ++b) sum += partial_[b * kSums + 1 + k];
    return sum;
  }

 private:
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kKeptUnits = 1 << 20;  // bytes of a row whose cosines and sines are kept
  static constexpr int64_t kSums = 2 + kOperands - 1;  // cosines, sines, and each operand but theta

  struct Sums {
    Vec<T> cos{}, sin{};
  };

  // Stretches of a block whose cosines and sines stay in the first-level cache: loop by loop over them, for one loop over
  // all of it waits for its own results (0.90 ns per oscillator and step, not 0.60).
  static constexpr int64_t kTileLength = 512;
  struct Tile {
    alignas(64) T data[kTileLength];
    KSSM_FN operator T*() { return data; }
  };
  template <class F> KSSM_FN static void for_tiles(int64_t begin, int64_t end, const F& f) {
    for (int64_t j = begin; j < end; j += kTileLength) f(j, j + kTileLength < end ? j + kTileLength : end);
  }

  // Three vectors at a time hide a polynomial's latency.
  KSSM_FN static void unit_vectors(const T* x, int64_t count, T* cos, T* sin) {
    int64_t j = 0;
    for (; j + 2 * W < count; j += 3 * W) some_unit_vectors<3>(x + j, cos + j, sin + j);
    for (; j < count; j += W) some_unit_vectors<1>(x + j, cos + j, sin + j);
  }
  template <int P> KSSM_FN static void some_unit_vectors(const T* x, T* cos, T* sin) {
    Vec<T> y[P], c[P], s[P];
    for (int p = 0; p < P; ++p) y[p] = load(x + p * W);
    sincos<T, P>(y, s, c);
    for (int p = 0; p < P; ++p) {
      store(cos + p * W, c[p]);
      store(sin + p * W, s[p]);
    }
  }

  // Cosines and sines of x on entry, of y on return: by the addition theorem where the two are near.
  KSSM_FN static void turn(const T* x, const T* y, int64_t count, T* cos, T* sin) {
    int64_t j = 0;
    for (; j + 2 * W < count; j += 3 * W) turn_some<3>(x + j, y + j, cos + j, sin + j);
    for (; j < count; j += W) turn_some<1>(x + j, y + j, cos + j, sin + j);
  }
  template <int P> KSSM_FN static void turn_some(const T* x, const T* y, T* cos, T* sin) {
    using V = Vec<T>;
    V to[P], by[P], c[P], s[P];
    Int<V> far{};
    for (int p = 0; p < P; ++p) {
      to[p] = load(y + p * W);
      by[p] = to[p] - load(x + p * W);
      far |= (Int<V>)((bits(by[p]) & ~Trig<T>::sign_bit) > bits(splat<V>(T(0.78))));  // NaN is far
    }
    if (__builtin_expect(any(far), 0)) {
      sincos<T, P>(to, s, c);
    } else {
      for (int p = 0; p < P; ++p) {
        const V from_c = load(cos + p * W), from_s = load(sin + p * W);
        V by_s, by_c;
        sincos_small(by[p], by_s, by_c);
        c[p] = fma(from_c, by_c, -(from_s * by_s));
        s[p] = fma(from_s, by_c, from_c * by_s);
      }
    }
    for (int p = 0; p < P; ++p) {
      store(cos + p * W, c[p]);
      store(sin + p * W, s[p]);
    }
  }

  void keep(int64_t begin, int64_t end, const T* cos, const T* sin) {
    for (int64_t j = begin; j < end; j += W) {
      store(cos_ + j, load(cos + (j - begin)));
      store(sin_ + j, load(sin + (j - begin)));
    }
  }

  // Sums over what is live; cosines and sines also to where the next pass finds them.
  KSSM_FN void add_up(int64_t begin, int64_t end, const T* cos, const T* sin, Sums& sums) {
    Vec<T> sum_cos = sums.cos, sum_sin = sums.sin;
    const bool keeps = keeps_;
    T *const to_cos = cos_, *const to_sin = sin_;
    for (int64_t j = begin; j < end; j += W) {
      Vec<T> c = load(cos + (j - begin)), s = load(sin + (j - begin));
      only_live(n_ - j, c, s);
      sum_cos = sum_cos + c;
      sum_sin = sum_sin + s;
      if (!keeps) continue;
      store(to_cos + j, c);
      store(to_sin + j, s);
    }
    sums = {sum_cos, sum_sin};
  }

  // g at phases `at` gains what the gradient of their mean field gives. cos, sin: those of the phases `theta`.
  KSSM_FN void add_mean_field(const T* theta, const T* at, Mean<T> gradient, int64_t begin, int64_t end, const T* cos,
                              const T* sin, T* g) const {
    Tile own_cos, own_sin;
    const T *c = cos, *s = sin;
    if (keeps_) {
      c = cos_ + begin;
      s = sin_ + begin;
    } else if (at != theta) {
      for (int64_t i = 0; i < end - begin; i += W) {
        store(own_cos + i, load(cos + i));
        store(own_sin + i, load(sin + i));
      }
      turn(theta + begin, at + begin, end - begin, own_cos, own_sin);
      c = own_cos;
      s = own_sin;
    }
    const Vec<T> on_cos = splat<Vec<T>>(gradient.cos), on_sin = splat<Vec<T>>(gradient.sin);
    for (int64_t j = begin; j < end; j += W) {
      Vec<T> own_c = load(c + (j - begin)), own_s = load(s + (j - begin));
      only_live(n_ - j, own_c, own_s);
      store(g + j, mean_field_adjoint(load(g + j), own_c, own_s, on_cos, on_sin));
    }
  }

  KSSM_FN void gain(const Totals& totals, int k, int64_t j, Vec<T> x, Vec<T>* scalars) const {
    if (totals.columns[k]) store(totals.columns[k] + j, load(totals.columns[k] + j) + x);
    if (!totals.summed[k]) return;
    Vec<T> none{};
    only_live(n_ - j, x, none);
    scalars[k] = scalars[k] + x;
  }

  KSSM_FN void put_sums(int64_t begin, const Sums& sums) {
    partial_[begin / kBlock * kSums] = static_cast<double>(lane_sum<T>(sums.cos));
    partial_[begin / kBlock * kSums + 1] = static_cast<double>(lane_sum<T>(sums.sin));
  }

  Mean<T> mean() const {
    double a = 0.0, b = 0.0;
    for (int64_t k = 0; k < blocks_; ++k) {
      a += partial_[kSums * k];
      b += partial_[kSums * k + 1];
    }
    return {static_cast<T>(a / static_cast<double>(n_)), static_cast<T>(b / static_cast<double>(n_))};
  }

  const KuramotoCall& call_;
  const int64_t n_, blocks_;
  const int threads_;
  const Keeping<T> keeping_;
  int64_t row_ = 0;
  const bool keeps_;
  RowBuffer<T> cos_, sin_;
  Buffer<double> partial_;
};

// The calls of such rows; memory may run out (false), or a signal stop them.
template <class T> bool forward_long(const KuramotoCall& call, int threads, void* features, void* phases);
template <class T>
bool backward_long(const KuramotoCall& call, int threads, const KuramotoSaved& saved, const GradientTarget* targets);

KSSM_NAMESPACE_END
