// The oscillator scan on the CPU. Equations: kssm_kernels/ops/oscillator_scan/__init__.py.

#include "entry_points.h"
#include "scan_run.h"
#include "transpose.h"

#include "../math/harmonics.h"

KSSM_NAMESPACE_BEGIN

namespace {

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

template <class T, bool MOEBIUS>
void forward_block(const OscillatorScanForward& call, const Block<T>& b, bool& ok, Watch* watch) {
  constexpr int64_t C = Run<T, MOEBIUS>::kChunk;
  const OscillatorScan& scan = call.scan;
  Arena<T> arena(Run<T, MOEBIUS>::room(b) + Readout<T>::room(b, scan.harmonics) + (4 * C + 5) * b.lanes, b, ok);
  if (failed(ok)) return;
  Run<T, MOEBIUS> run(scan, b, arena);
  Readout<T> readout(call, b, arena);
  const auto parts = [&](int64_t rows) { return Parts<T>{arena.take(rows * b.lanes), arena.take(rows * b.lanes)}; };
  const Parts<T> states = parts(C), mean = parts(1), v = MOEBIUS ? states : parts(C);
  Parts<T> before = run.start();
  for (int64_t o = 0; o < b.lanes; o += kLanes<T>) mean.set(o, run.start_mean().at(o));
  const int64_t width = scan.heads * scan.oscillators, column = b.first * b.grid.n;
  for (int64_t t0 = 0; t0 < scan.steps; t0 += C) {
    if (watch && watch->stop(C * b.lanes)) return;
    const int64_t count = scan.steps - t0 < C ? scan.steps - t0 : C;
    run.chunk(t0, count, before, mean, states, v);
    readout.write(t0, count, v);
    for (int64_t i = 0; scan.every && i < count; ++i) {
      const int64_t done = t0 + i + 1;
      if (done % scan.every) continue;
      const int64_t place = (b.row * (scan.steps / scan.every) + done / scan.every - 1) * width + column;
      b.copy_out(code_of<T>(), states.row(i, b.lanes).re, static_cast<T*>(pointer(scan.states_re)) + place);
      b.copy_out(code_of<T>(), states.row(i, b.lanes).im, static_cast<T*>(pointer(scan.states_im)) + place);
    }
    before = states.row(count - 1, b.lanes);
  }
  const Parts<T> last = scan.steps ? before : run.given();
  b.copy_out(code_of<T>(), last.re, static_cast<T*>(pointer(call.last_re)) + b.row * width + column);
  b.copy_out(code_of<T>(), last.im, static_cast<T*>(pointer(call.last_im)) + b.row * width + column);
}

template <class T, bool MOEBIUS> bool forward(const OscillatorScanForward& call, int threads, Watch* watch) {
  const Blocks<T> blocks(call.scan, threads);
  const double work = scan_work<T>(call.scan);
  bool ok = true;
  Watch* const looking = watched(watch, work);
  const int64_t width = call.scan.heads * call.scan.oscillators, size = dtype_size(code_of<T>());
  const int64_t kept = call.scan.every ? call.scan.rows * (call.scan.steps / call.scan.every) * width * size : 0;
  for (const int64_t states : {call.scan.states_re, call.scan.states_im}) expect_writes(states, kept);
  parallel_for(blocks.count, worth_threads(work, threads),
               [&](int64_t i) { forward_block<T, MOEBIUS>(call, blocks.at(call.scan, i), ok, looking); }, looking);
  return ok;
}

}  // namespace

bool oscillator_scan_forward(const OscillatorScanForward& call, int threads, Watch* watch) {
  return KSSM_SCAN_KINDS(call.scan, forward, call, threads, watch);
}

KSSM_NAMESPACE_END
