// The readout of the oscillator scan.
#pragma once

#include "scan_run.h"
#include "transpose.h"

#include "../math/harmonics.h"

KSSM_NAMESPACE_BEGIN

// Order parameters of a chunk of steps. Time goes to the lanes, so that the sum over a head's oscillators and their
// powers is made of whole vectors for any N, and off the way from one state to the next.
template <class T> class Readout {
 public:
  using V = Vec<T>;
  static constexpr int64_t W = kLanes<T>;

  static int64_t room(const Block<T>& b, int64_t harmonics) {
    const int64_t width = b.heads * harmonics + W;
    return harmonics ? (2 * width + 4 * W + 4 * harmonics) * W + 2 * W * width : 0;
  }

  Readout(const OscillatorScanForward& call, const Block<T>& block, Arena<T>& arena)
      : call_(call), b_(block), harmonics_(call.scan.harmonics), width_(block.heads * harmonics_) {
    if (!harmonics_) return;
    for (V** part : {&columns_[0], &columns_[1]}) *part = vectors(arena, width_ + W);
    for (V** part : {&v_[0], &v_[1], &power_[0], &power_[1]}) *part = vectors(arena, W);
    for (V** part : {&sum_, &lost_}) *part = vectors(arena, 2 * harmonics_);
    for (T*& part : rows_) part = arena.take(W * padded<T>(width_));
  }

  // v [count, lanes], count <= W: rows behind the last may be read, and what comes of them is dropped.
  void write(int64_t t0, int64_t count, Parts<T> v) {
    if (!harmonics_) return;
    const int64_t group = b_.grid.group, step = group < W ? group : W;
    for (int64_t h = 0; h < b_.heads; ++h) {
      for (int64_t n = 0; n < 2 * harmonics_; ++n) sum_[n] = lost_[n] = V{};
      for (int64_t j = 0; j < b_.grid.n; j += step) {
        const int64_t lane = h * group + j, in_vector = lane % W;
        if (in_vector == 0) {
          const T* const parts[2] = {v.re + lane, v.im + lane};
          for (int k = 0; k < 2; ++k) rows_to_lanes<T>([&](int64_t i) { return parts[k] + i * b_.lanes; }, W, v_[k]);
        }
        add(in_vector, b_.grid.n - j < step ? b_.grid.n - j : step);
      }
      for (int64_t n = 0; n < harmonics_; ++n) {
        const V share = splat<V>(T(1) / static_cast<T>(b_.grid.n));
        V c = share * sum_[2 * n], s = share * sum_[2 * n + 1];
        into_unit_disk(c, s);
        columns_[0][h * harmonics_ + n] = c;
        columns_[1][h * harmonics_ + n] = s;
      }
    }
    const int64_t stride = padded<T>(width_), outputs[2] = {call_.order_re, call_.order_im};
    for (int k = 0; k < 2; ++k) {
      lanes_to_rows<T>(columns_[k], width_, [&](int64_t i) { return rows_[k] + i * stride; });
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = ((b_.row * call_.scan.steps + t0 + i) * call_.scan.heads + b_.first) * harmonics_;
        void* const target = element(pointer(outputs[k]), call_.order_code, place);
        store_row(call_.order_code, target, width_, rows_[k] + i * stride);
      }
    }
  }

 private:
  static V* vectors(Arena<T>& arena, int64_t count) { return reinterpret_cast<V*>(arena.take(count * W)); }

  // Adds the powers of `count` oscillators: a few partial sums, and what rounding cuts off the total of many. Equal
  // addends one after another would lift |Z| above 1.
  void add(int64_t first, int64_t count) {
    constexpr int64_t S = W < 4 ? W : 4;
    if (b_.grid.group < S) return add_by<1>(first, count);
    add_by<S>(first, (count + S - 1) / S * S);  // lanes without an oscillator hold zeros
  }
  template <int64_t S> void add_by(int64_t first, int64_t count) {
    const V *const v_re = v_[0] + first, *const v_im = v_[1] + first;
    for (int64_t n = 0; n < harmonics_; ++n) {
      V c[S] = {}, s[S] = {};
      const V *const re = n == 1 ? v_re : power_[0], *const im = n == 1 ? v_im : power_[1];
      for (int64_t j = 0; j < count; j += S) {
        KSSM_UNROLL
        for (int64_t k = j; k < j + S; ++k) {
          Complex<V> power = {v_re[k], v_im[k]};
          if (n) {
            power = Complex<V>{re[k], im[k]} * power;
            power_[0][k] = power.re;
            power_[1][k] = power.im;
          }
          c[k - j] = c[k - j] + power.re;
          s[k - j] = s[k - j] + power.im;
        }
      }
      KSSM_UNROLL
      for (int64_t width = S / 2; width > 0; width /= 2) {
        KSSM_UNROLL
        for (int64_t k = 0; k < width; ++k) {
          c[k] = c[k] + c[k + width];
          s[k] = s[k] + s[k + width];
        }
      }
      compensated(sum_[2 * n], lost_[2 * n], c[0]);
      compensated(sum_[2 * n + 1], lost_[2 * n + 1], s[0]);
    }
  }
  KSSM_FN static void compensated(V& sum, V& lost, V x) {
    const V y = x - lost, total = sum + y;
    lost = (total - sum) - y;
    sum = total;
  }

  const OscillatorScanForward& call_;
  const Block<T>& b_;
  const int64_t harmonics_, width_;
  V *columns_[2], *v_[2], *power_[2], *sum_, *lost_;
  T* rows_[2];
};

KSSM_NAMESPACE_END
