// One row of more than kRowBlock oscillators, which all threads share block by block. Each pass over it takes one step
// and the sums of the next. The cosines and sines of a row that fits a second-level cache are kept between passes; of a
// longer one they are computed again, for its memory takes longer to read than they do to compute.
#pragma once

#include "kuramoto_row.h"

KSSM_NAMESPACE_BEGIN

template <class T> class LongRow {
 public:
  LongRow(const KuramotoCall& call, int threads, bool& ok)
      : call_(call), n_(call.n), blocks_((call.n + kRowBlock - 1) / kRowBlock), threads_(threads), keeping_(call.steps),
        keeps_(call.n * static_cast<int64_t>(sizeof(T)) <= kKeptUnits), cos_(keeps_ ? call.n : 1, ok),
        sin_(keeps_ ? call.n : 1, ok), partial_(kSums * blocks_, ok) {}

  const Keeping<T>& keeping() const { return keeping_; }
  void set_row(int64_t row) { row_ = row; }
  bool stopped() const { return call_.watch && call_.watch->stopped(); }

  // f(begin, end) over the row's blocks
  template <class F> void for_blocks(const F& f) const {
    parallel_for(
        blocks_, threads_, [&](int64_t b) { f(b * kRowBlock, (b + 1) * kRowBlock < n_ ? (b + 1) * kRowBlock : n_); },
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
        unit_vectors(theta + begin, begin, end, kept_or(cos_, begin, cos), kept_or(sin_, begin, sin), sums);
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
      alignas(64) float xi[kRowBlock + 127];
      if (call_.has_noise) fill_normals(row_, step, call_.seed, block, block_end - block, xi);
      Sums sums;
      if (NEXT && keeps_) {
        for_tiles(block, block_end, [&](int64_t begin, int64_t end) {
          Tile next;
          step_at_hand(from, moved, z, xi, block, begin, end, folds, to, phases, next);
          unit_vectors(next, begin, end, cos_ + begin, sin_ + begin, sums);
        });
      } else {
        const RowOperands<T> operands(call_, row_);
        Sums own = sums;  // a copy, in registers
        int64_t j = block;
        for (; j + 2 * W < block_end; j += 3 * W)
          whole_step<NEXT, 3>(operands, from, moved, z, xi, block, j, folds, to, phases, own);
        for (; j < block_end; j += W)
          whole_step<NEXT, 1>(operands, from, moved, z, xi, block, j, folds, to, phases, own);
        sums = own;
      }
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
      alignas(64) float xi[kRowBlock + 127];
      const bool noise = totals.columns[kNoiseScale] || totals.summed[kNoiseScale];
      if (noise) fill_normals(row_, step, call_.seed, block, block_end - block, xi);
      Vec<T> scalars[kOperands] = {};
      const Vec<T> mean_cos = splat<Vec<T>>(z.cos), mean_sin = splat<Vec<T>>(z.sin);
      const RowOperands<T> operands(call_, row_);
      const auto share = [&](int64_t j, Vec<T> x, Vec<T> c, Vec<T> s, Vec<T> gj, Sums& own) __attribute__((always_inline)) {
        operands.shift(x, j, c, s);
        const Vec<T> dt_g = operands.dt() * gj, dt_g_k = dt_g * operands.coupling(j);
        const Vec<T> q = align(mean_cos, mean_sin, c, s);
        Vec<T> sine = dt_g_k * s, cosine = dt_g_k * c;
        only_live(n_ - j, sine, cosine);
        own.cos = own.cos - sine;
        own.sin = own.sin + cosine;
        gain(totals, kCoupling, j, dt_g * pull(mean_cos, mean_sin, c, s), scalars);
        gain(totals, kOmega, j, dt_g, scalars);
        gain(totals, kPhaseLag, j, -(dt_g_k * q), scalars);
        if (noise) gain(totals, kNoiseScale, j, -(gj * load_normals(xi + (j - block), T(0))), scalars);
        store(g + j, own_adjoint(gj, dt_g_k, q));
      };
      const Vec<T> on_cos = splat<Vec<T>>(after_gradient.cos), on_sin = splat<Vec<T>>(after_gradient.sin);
      Sums own;
      if (keeps_) {
        for_tiles(block, block_end, [&](int64_t begin, int64_t end) {
          Tile cos, sin;
          Sums unused, tile_sums = own;
          unit_vectors(theta + begin, begin, end, cos, sin, unused);
          for (int64_t j = begin; j < end; j += W) {
            Vec<T> gj = load(g + j);
            if (after) gj = mean_field_adjoint(gj, load(cos_ + j), load(sin_ + j), on_cos, on_sin);
            const Vec<T> c = load(cos + (j - begin)), s = load(sin + (j - begin));
            store(cos_ + j, c);
            store(sin_ + j, s);
            share(j, load(theta + j), c, s, gj, tile_sums);
          }
          own = tile_sums;
        });
      } else {
        for (int64_t j = block; j < block_end; j += 2 * W) {
          Vec<T> x[2], c[2], s[2], gj[2];
          const int count = j + W < block_end ? 2 : 1;
          for (int p = 0; p < 2; ++p) x[p] = load(theta + j + (p < count ? p : 0) * W);
          sincos<T, 2>(x, s, c);
          for (int p = 0; p < 2; ++p) gj[p] = load(g + j + (p < count ? p : 0) * W);
          if (after) {
            Vec<T> y[2], own_c[2] = {c[0], c[1]}, own_s[2] = {s[0], s[1]};
            for (int p = 0; p < 2; ++p) y[p] = load(after + j + (p < count ? p : 0) * W);
            turn<2>(x, y, own_c, own_s);
            for (int p = 0; p < 2; ++p) gj[p] = mean_field_adjoint(gj[p], own_c[p], own_s[p], on_cos, on_sin);
          }
          for (int p = 0; p < count; ++p) share(j + p * W, x[p], c[p], s[p], gj[p], own);
        }
      }
      put_sums(block, own);
      for (int k = kCoupling; k < kOperands; ++k)
        if (totals.summed[k])
          partial_[block / kRowBlock * kSums + 1 + k] += static_cast<double>(lane_sum<T>(scalars[k]));
    });
    return mean();
  }

  // What is left to do at the first phases.
  void finish(const T* theta, Mean<T> gradient, T* g) {
    for_blocks([&](int64_t block, int64_t block_end) {
      for_tiles(block, block_end, [&](int64_t begin, int64_t end) {
        Tile cos, sin;
        Sums unused;
        if (!keeps_) unit_vectors(theta + begin, begin, end, cos, sin, unused);
        const T *const c = kept_or(cos_, begin, cos), *const s = kept_or(sin_, begin, sin);
        const Vec<T> on_cos = splat<Vec<T>>(gradient.cos), on_sin = splat<Vec<T>>(gradient.sin);
        for (int64_t j = begin; j < end; j += W)
          store(g + j, mean_field_adjoint(load(g + j), load(c + (j - begin)), load(s + (j - begin)), on_cos, on_sin));
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

  KSSM_FN T* kept_or(T* kept, int64_t begin, T* own) const { return keeps_ ? kept + begin : own; }

  // One step of P vectors, from phases x: stores what is wanted, returns the phases after it.
  template <int P>
  KSSM_FN void step_some(const RowOperands<T>& operands, const T* from, T* moved, Mean<T> z, const Vec<T> (&x)[P],
                         const Vec<T> (&c)[P], const Vec<T> (&s)[P], const float* xi, int64_t block, int64_t j, bool folds,
                         T* to, T* phases, Vec<T> (&next)[P]) const {
    for (int p = 0; p < P; ++p) {
      const int64_t i = j + p * W;
      Vec<T> lag_c = c[p], lag_s = s[p];
      operands.shift(x[p], i, lag_c, lag_s);
      if (!moved) {
        next[p] = operands.moved(x[p], z, lag_c, lag_s, i, xi, block);
        if (to) store(to + i, next[p]);
      } else {
        Vec<T> base = load(from + i), y = operands.moved(load(moved + i), z, lag_c, lag_s, i, xi, block);
        if (folds) fold(base, y, keeping_.wraps);
        if (to && (folds || to != from)) store(to + i, base);
        store(moved + i, y);
        next[p] = base + y;
      }
      if (phases) store(phases + i, next[p]);
    }
  }
  KSSM_FN static Vec<T> phases_at(const T* base, const T* moved, int64_t j) {
    return moved ? load(base + j) + load(moved + j) : load(base + j);
  }

  // A tile's step where cosines and sines are kept, to `next`.
  KSSM_FN void step_at_hand(const T* from, T* moved, Mean<T> z, const float* xi, int64_t block, int64_t begin, int64_t end,
                            bool folds, T* to, T* phases, T* next) const {
    const RowOperands<T> operands(call_, row_);
    for (int64_t j = begin; j < end; j += W) {
      const Vec<T> x[1] = {phases_at(from, moved, j)}, c[1] = {load(cos_ + j)}, s[1] = {load(sin_ + j)};
      Vec<T> after[1];
      step_some<1>(operands, from, moved, z, x, c, s, xi, block, j, folds, to, phases, after);
      store(next + (j - begin), after[0]);
    }
  }

  // A step and, with NEXT, its share of the sums after it, where nothing is kept: all in registers.
  template <bool NEXT, int P>
  KSSM_FN void whole_step(const RowOperands<T>& operands, const T* from, T* moved, Mean<T> z, const float* xi,
                          int64_t block, int64_t j, bool folds, T* to, T* phases, Sums& sums) const {
    Vec<T> x[P], next[P], c[P], s[P];
    for (int p = 0; p < P; ++p) x[p] = phases_at(from, moved, j + p * W);
    sincos<T, P>(x, s, c);
    step_some<P>(operands, from, moved, z, x, c, s, xi, block, j, folds, to, phases, next);
    if (!NEXT) return;
    turn<P>(x, next, c, s);
    for (int p = 0; p < P; ++p) {
      only_live(n_ - j - p * W, c[p], s[p]);
      sums.cos = sums.cos + c[p];
      sums.sin = sums.sin + s[p];
    }
  }

  // Cosines and sines of x, and their sums over what is live; zeros behind the row's end. Three vectors at a time hide a
  // polynomial's latency.
  KSSM_FN void unit_vectors(const T* x, int64_t begin, int64_t end, T* cos, T* sin, Sums& sums) const {
    const int64_t count = end - begin, left = n_ - begin;
    Vec<T> sum_cos = sums.cos, sum_sin = sums.sin;
    int64_t j = 0;
    for (; j + 2 * W < count; j += 3 * W) some_unit_vectors<3>(x + j, left - j, cos + j, sin + j, sum_cos, sum_sin);
    for (; j < count; j += W) some_unit_vectors<1>(x + j, left - j, cos + j, sin + j, sum_cos, sum_sin);
    sums = {sum_cos, sum_sin};
  }
  template <int P>
  KSSM_FN static void some_unit_vectors(const T* x, int64_t left, T* cos, T* sin, Vec<T>& sum_cos, Vec<T>& sum_sin) {
    Vec<T> y[P], c[P], s[P];
    for (int p = 0; p < P; ++p) y[p] = load(x + p * W);
    sincos<T, P>(y, s, c);
    for (int p = 0; p < P; ++p) {
      only_live(left - p * W, c[p], s[p]);
      store(cos + p * W, c[p]);
      store(sin + p * W, s[p]);
      sum_cos = sum_cos + c[p];
      sum_sin = sum_sin + s[p];
    }
  }

  // Cosines and sines of x on entry, of y on return: by the addition theorem where the two are near.
  template <int P>
  KSSM_FN static void turn(const Vec<T> (&x)[P], const Vec<T> (&y)[P], Vec<T> (&c)[P], Vec<T> (&s)[P]) {
    using V = Vec<T>;
    V by[P];
    Int<V> far{};
    for (int p = 0; p < P; ++p) {
      by[p] = y[p] - x[p];
      far |= (Int<V>)((bits(by[p]) & ~Trig<T>::sign_bit) > bits(splat<V>(T(0.78))));  // NaN is far
    }
    if (__builtin_expect(any(far), 0)) return sincos<T, P>(y, s, c);
    for (int p = 0; p < P; ++p) {
      V by_s, by_c;
      sincos_small(by[p], by_s, by_c);
      const V turned = fma(c[p], by_c, -(s[p] * by_s));
      s[p] = fma(s[p], by_c, c[p] * by_s);
      c[p] = turned;
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
    partial_[begin / kRowBlock * kSums] = static_cast<double>(lane_sum<T>(sums.cos));
    partial_[begin / kRowBlock * kSums + 1] = static_cast<double>(lane_sum<T>(sums.sin));
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
