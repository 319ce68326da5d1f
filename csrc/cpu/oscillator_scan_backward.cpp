// The adjoint of the oscillator scan on the CPU, in reverse time. Equations:
// kssm_kernels/ops/oscillator_scan/__init__.py.

#include "entry_points.h"
#include "scan_run.h"

KSSM_NAMESPACE_BEGIN

namespace {

template <class T, bool MOEBIUS> class Adjoint {
 public:
  using V = Vec<T>;
  static constexpr int64_t W = kLanes<T>, kChunk = Run<T, MOEBIUS>::kChunk;

  static int64_t room(const OscillatorScan& scan, const Block<T>& b) {
    const int64_t rows = segment_steps(scan) + 1;
    return Run<T, MOEBIUS>::room(b) + (2 * rows + 5 * (kChunk + 1) + 2 * kChunk + 20) * b.lanes +
           2 * kChunk * scan.harmonics * b.heads + scan.harmonics * b.heads + 2 * kChunk * (b.heads + W) + 24 * W;
  }

  Adjoint(const OscillatorScanBackward& call, const Block<T>& block, Arena<T>& arena)
      : call_(call), scan_(call.scan), b_(block), run_(call.scan, block, arena),
        width_(scan_.heads * scan_.oscillators), column_(block.first * block.grid.n) {
    const int64_t L = b_.lanes;
    const auto parts = [&](int64_t rows) { return Parts<T>{arena.take(rows * L), arena.take(rows * L)}; };
    states_ = parts(segment_steps(scan_) + 1);
    v_ = parts(kChunk + 1);
    factor_ = arena.take((kChunk + 1) * L);
    mean_ = parts(kChunk + 1);
    for (Parts<T>* p : {&carry_, &carry_seen_, &initial_, &force_, &given_, &run_mean_}) *p = {arena.zeros(L), arena.zeros(L)};
    lag_ = arena.zeros(L);
    for (T*& out : outputs_) out = arena.take(L);
    rho_ = arena.take(kChunk * L);
    g_strength_ = arena.take(kChunk * L);
    for (T*& part : order_) part = arena.zeros(kChunk * scan_.harmonics * b_.heads + W);
    order_row_ = arena.take(scan_.harmonics * b_.heads);
    head_row_ = arena.zeros(kChunk * b_.heads);
    head_rho_ = arena.zeros(kChunk * b_.heads);
  }

  void run(Watch* watch) {
    load(call_.g_last_re, call_.g_last_im, b_.row * width_ + column_, carry_);
    const int64_t length = segment_steps(scan_);
    for (int64_t first = (scan_.steps - 1) / length * length; scan_.steps && first >= 0; first -= length) {
      const int64_t last = first + length < scan_.steps ? first + length : scan_.steps;
      if (!load_states(first, last, watch)) return;
      for (int64_t t0 = first + (last - first - 1) / kChunk * kChunk; t0 >= first; t0 -= kChunk) {
        if (watch && watch->stop(3 * kChunk * b_.lanes)) return;
        chunk(t0, last - t0 < kChunk ? last - t0 : kChunk, states_.row(t0 - first, b_.lanes));
      }
    }
    const Parts<T> found = scan_.steps ? initial_ : carry_;
    store_start(found.re, call_.g_initial_re);
    store_start(found.im, call_.g_initial_im);
    if (call_.g_lag) {
      T* const target = static_cast<T*>(pointer(call_.g_lag)) + b_.row * scan_.heads + b_.first;
      for (int64_t h = 0; h < b_.heads; ++h) target[h] = lag_[h * b_.grid.group];
    }
  }

 private:
  // Steps whose states are held at once: a chunk of those that were kept, or what lies between two that were.
  static int64_t segment_steps(const OscillatorScan& scan) {
    return scan.every <= 1 ? kChunk : scan.every < scan.steps ? scan.every : scan.steps > 0 ? scan.steps : 1;
  }

  // A pair of rows of the compute dtype in lanes; zeros where there is none.
  void load(int64_t re, int64_t im, int64_t place, Parts<T> out) const {
    if (re) b_.copy_in(code_of<T>(), static_cast<const T*>(pointer(re)) + place, out.re);
    if (im) b_.copy_in(code_of<T>(), static_cast<const T*>(pointer(im)) + place, out.im);
  }
  void store_start(const T* lanes, int64_t target) const {
    if (target) b_.copy_out(code_of<T>(), lanes, static_cast<T*>(pointer(target)) + b_.row * width_ + column_);
  }

  // The state after `done` steps, which was kept, or the initial one.
  void load_kept(int64_t done, Parts<T> out) const {
    if (done == 0) {
      for (int64_t o = 0; o < b_.lanes; o += W) out.set(o, run_.start().at(o));
      return;
    }
    const int64_t place = (b_.row * (scan_.steps / scan_.every) + done / scan_.every - 1) * width_ + column_;
    load(scan_.states_re, scan_.states_im, place, out);
  }

  // states_, rows 0 .. last - first: before step `first`, and after each step. False after a signal.
  bool load_states(int64_t first, int64_t last, Watch* watch) {
    if (scan_.every == 1) {
      for (int64_t t = first; t <= last; ++t) load_kept(t, states_.row(t - first, b_.lanes));
      return true;
    }
    load_kept(first, states_);
    const Parts<T> v = MOEBIUS ? states_ : v_;
    run_.see(states_, v_, run_mean_);
    for (int64_t t0 = first; t0 < last; t0 += kChunk) {
      if (watch && watch->stop(kChunk * b_.lanes)) return false;
      const Parts<T> before = states_.row(t0 - first, b_.lanes);
      const Parts<T> after = states_.row(t0 - first + 1, b_.lanes);
      run_.chunk(t0, last - t0 < kChunk ? last - t0 : kChunk, before, run_mean_, after, MOEBIUS ? after : v);
    }
    return true;
  }

  // Steps t0 .. t0 + count - 1 in reverse; states: rows 0 .. count, before the first and after each.
  void chunk(int64_t t0, int64_t count, Parts<T> states) {
    run_.load_heads(t0, count);
    for (int64_t i = 0; i <= count; ++i) {
      const Parts<T> z = states.row(i, b_.lanes);
      if constexpr (!MOEBIUS) {
        for (int64_t o = 0; o < b_.lanes; o += W) {
          const Squashed<V> y = squash(z.at(o));
          v_.row(i, b_.lanes).set(o, y.u);
          store(factor_ + i * b_.lanes + o, y.factor);
        }
      }
      if (run_.coupled() && i < count) run_.means(seen_row(states, i), mean_.row(i, b_.lanes));
    }
    if (reads()) load_orders(t0, count);
    for (int64_t i = count - 1; i >= 0; --i) one_step(t0 + i, i, states);
    store_heads(t0, count);
  }

  Parts<T> seen_row(Parts<T> states, int64_t i) const { return (MOEBIUS ? states : v_).row(i, b_.lanes); }

  void one_step(int64_t t, int64_t i, Parts<T> states) {
    const bool reset = run_.is_reset(t);
    const Parts<T> before = reset ? run_.start() : states.row(i, b_.lanes), after = states.row(i + 1, b_.lanes);
    const Parts<T> mean = reset ? run_.start_mean() : mean_.row(i, b_.lanes), shown = seen_row(states, i + 1);
    const bool read = reads();
    const bool given = scan_.every == 1 && (call_.g_states_re || call_.g_states_im);
    if (given) load(call_.g_states_re, call_.g_states_im, (b_.row * scan_.steps + t) * width_ + column_, given_);
    const auto in = run_.inputs(t);
    T* out[4];
    for (int k = 0; k < 4; ++k) out[k] = target(k, t);
    for (int64_t o = 0; o < b_.lanes; o += W) {
      const WriteGates<V> gates = run_.gates(in, i, o);
      const Complex<V> s = gates.lam * before.at(o);
      Complex<V> force = gates.d;
      if (run_.coupled()) force = force + run_.strength(i, o) * run_.turned(mean, o);
      Complex<V> seen_g = carry_seen_.at(o), g = carry_.at(o);
      if (read) {
        const int64_t stride = b_.heads, first = i * scan_.harmonics * stride;
        const T *const re = order_[0] + first, *const im = order_[1] + first;
        seen_g = seen_g + readout_adjoint(shown.at(o), scan_.harmonics, [&](int64_t n) {
          return Complex<V>{b_.spread(re + (n - 1) * stride, o), b_.spread(im + (n - 1) * stride, o)};
        });
      }
      if (given) g = g + given_.at(o);
      if constexpr (MOEBIUS) g = g + seen_g;
      else g = g + Squashed<V>{shown.at(o), load_lanes(factor_ + (i + 1) * b_.lanes + o)}.adjoint(seen_g);
      const StepAdjoint<V> back = step_adjoint<MOEBIUS>(s, force, after.at(o), g);
      carry_.set(o, times_conjugate(back.s, gates.lam));
      const InputGradients<V> y = input_gradients<MOEBIUS>(gates, s, back);
      store(out[0] + o, y.p);
      store(out[1] + o, y.q);
      store(out[2] + o, y.gate);
      store(out[3] + o, y.phase);
      if (run_.keeps()) store(rho_ + i * b_.lanes + o, y.rho);
      if (run_.coupled()) force_.set(o, back.force);
    }
    for (int k = 0; k < 4; ++k) write(k, t, out[k]);
    if (run_.coupled()) through_field(i, mean);
    if (reset || t == 0) to_initial();
  }

  KSSM_FN static V load_lanes(const T* p) { return kssm::KSSM_ISA::load(p); }

  bool reads() const { return scan_.harmonics && (call_.g_order_re || call_.g_order_im); }

  // Gradients of a chunk's order parameters, divided by N: [steps, H, heads]. A chunk ahead: the processor cannot hand
  // single numbers that were just stored on to the load of a vector, and waits.
  void load_orders(int64_t t0, int64_t count) {
    const int64_t sources[2] = {call_.g_order_re, call_.g_order_im}, size = b_.heads * scan_.harmonics;
    const T share = T(1) / static_cast<T>(scan_.oscillators);
    for (int k = 0; k < 2; ++k) {
      if (!sources[k]) continue;  // zeros
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = ((b_.row * scan_.steps + t0 + i) * scan_.heads + b_.first) * scan_.harmonics;
        const void* const source = element(pointer(sources[k]), call_.order_code, place);
        const T* const row = contiguous_row(call_.order_code, source, size, order_row_);
        T* const out = order_[k] + i * size;
        for (int64_t n = 0; n < scan_.harmonics; ++n)
          for (int64_t h = 0; h < b_.heads; ++h) out[n * b_.heads + h] = share * row[h * scan_.harmonics + n];
      }
    }
  }

  // Gradients of K, the lag and the states that the field was made of.
  void through_field(int64_t i, Parts<T> mean) {
    for (T* part : {force_.re, force_.im}) {
      b_.only_live(part);  // gradients of the order parameters are in every lane
      b_.head_sums(part, T(1), part);
    }
    const V share = splat<V>(T(1) / static_cast<T>(scan_.oscillators));
    for (int64_t o = 0; o < b_.lanes; o += W) {
      const Complex<V> g = force_.at(o), turned = run_.turned(mean, o);
      const V strength = run_.strength(i, o);
      const Complex<V> field = strength * turned;
      store(g_strength_ + i * b_.lanes + o, real_of(turned, g));
      store(lag_ + o, load_lanes(lag_ + o) - fma(field.re, g.im, -(field.im * g.re)));
      carry_seen_.set(o, (share * strength) * (run_.has_lag() ? g * run_.lag().at(o) : g));
    }
  }

  // What a first step hands on goes to the initial state.
  void to_initial() {
    for (int64_t o = 0; o < b_.lanes; o += W) {
      Complex<V> g = carry_seen_.at(o);
      if constexpr (!MOEBIUS) g = squash(run_.start().at(o)).adjoint(g);
      initial_.set(o, initial_.at(o) + (carry_.at(o) + g));
      carry_.set(o, {V{}, V{}});
      carry_seen_.set(o, {V{}, V{}});
    }
  }

  // Where the gradient of input k of step t goes, in lanes: its own memory, or a row that is then written out.
  T* target(int k, int64_t t) const {
    void* const memory = memory_of(k, t);
    T* const direct = memory ? b_.lanes_at(code(k), memory) : nullptr;
    return direct ? direct : outputs_[k];
  }
  void write(int k, int64_t t, const T* lanes) const {
    if (void* const memory = memory_of(k, t); memory && lanes == outputs_[k]) b_.copy_out(code(k), lanes, memory);
  }
  int64_t code(int k) const { return (&scan_.p)[k].code; }
  void* memory_of(int k, int64_t t) const {
    const int64_t data = (&call_.g_p)[k];
    return data ? element(pointer(data), code(k), (b_.row * scan_.steps + t) * width_ + column_) : nullptr;
  }

  void store_heads(int64_t t0, int64_t count) {
    const HeadRows<T>& heads = run_.heads();
    const int64_t total = count * b_.heads;
    if (run_.keeps()) {
      for (int64_t i = 0; i < count; ++i) {
        b_.head_sums(rho_ + i * b_.lanes, T(1), rho_ + i * b_.lanes);
        for (int64_t h = 0; h < b_.heads; ++h) head_rho_[i * b_.heads + h] = rho_[i * b_.lanes + h * b_.grid.group];
      }
    }
    if (call_.g_coupling) {
      for (int64_t i = 0; i < count; ++i) {
        const T* const lanes = g_strength_ + i * b_.lanes;
        for (int64_t h = 0; h < b_.heads; ++h) head_row_[i * b_.heads + h] = lanes[h * b_.grid.group];
      }
      for (int64_t i = 0; i < total; i += W) {
        V g = load_lanes(heads.slope + i) * load_lanes(head_row_ + i);
        if (scan_.tied_leak) g = g - load_lanes(heads.strength + i) * load_lanes(head_rho_ + i);
        store(head_row_ + i, g);
      }
      write_heads(scan_.coupling.code, call_.g_coupling, t0, count);
    }
    if (call_.g_forget) {
      for (int64_t i = 0; i < total; i += W) {  // heads.forget: 1 - f
        const V f = splat<V>(T(1)) - load_lanes(heads.forget + i);
        store(head_row_ + i, -f * load_lanes(head_rho_ + i));
      }
      write_heads(scan_.forget.code, call_.g_forget, t0, count);
    }
  }
  void write_heads(int64_t code, int64_t data, int64_t t0, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      void* const memory = element(pointer(data), code, (b_.row * scan_.steps + t0 + i) * scan_.heads + b_.first);
      store_row(code, memory, b_.heads, head_row_ + i * b_.heads);
    }
  }

  const OscillatorScanBackward& call_;
  const OscillatorScan& scan_;
  const Block<T>& b_;
  Run<T, MOEBIUS> run_;
  const int64_t width_, column_;
  Parts<T> states_, v_, mean_, carry_, carry_seen_, initial_, force_, given_, run_mean_;
  T *factor_, *lag_, *outputs_[4], *rho_, *g_strength_, *order_[2], *order_row_, *head_row_, *head_rho_;
};

// [rows, width] summed over the rows, always in their order.
template <class T> void sum_rows(const T* rows, int64_t count, int64_t width, int64_t target) {
  T* const out = static_cast<T*>(pointer(target));
  for (int64_t c = 0; c < width; ++c) {
    double sum = 0.0;
    for (int64_t r = 0; r < count; ++r) sum += static_cast<double>(rows[r * width + c]);
    out[c] = static_cast<T>(sum);
  }
}

template <class T, bool MOEBIUS> bool backward(const OscillatorScanBackward& given, int threads, Watch* watch) {
  OscillatorScanBackward call = given;
  const OscillatorScan& scan = call.scan;
  const Blocks<T> blocks(scan, threads);
  const double work = 3 * scan_work<T>(scan);
  bool ok = true;
  Watch* const looking = watched(watch, work);
  const int64_t width = scan.heads * scan.oscillators;
  const auto rows_of = [&](int64_t target, int64_t summed, int64_t columns) {
    return target && summed ? scan.rows * columns : 0;
  };
  Buffer<T> lag(rows_of(call.g_lag, call.lag_summed, scan.heads), ok);
  Buffer<T> re(rows_of(call.g_initial_re, call.re_summed, width), ok);
  Buffer<T> im(rows_of(call.g_initial_im, call.im_summed, width), ok);
  if (failed(ok)) return false;
  const int64_t elements = scan.rows * scan.steps * width;
  const int64_t targets[4] = {call.g_p, call.g_q, call.g_gate, call.g_phase};
  const int64_t codes[4] = {scan.p.code, scan.q.code, scan.gate.code, scan.phase.code};
  for (int k = 0; k < 4; ++k) expect_writes(targets[k], elements * dtype_size(codes[k]));
  const auto redirected = [](int64_t target, int64_t summed, T* rows) {
    return target && summed ? reinterpret_cast<int64_t>(rows) : target;
  };
  call.g_lag = redirected(call.g_lag, call.lag_summed, lag);
  call.g_initial_re = redirected(call.g_initial_re, call.re_summed, re);
  call.g_initial_im = redirected(call.g_initial_im, call.im_summed, im);
  parallel_for(blocks.count, worth_threads(work, threads), [&](int64_t i) {
    const Block<T> block = blocks.at(scan, i);
    Arena<T> arena(Adjoint<T, MOEBIUS>::room(scan, block), block, ok);
    if (failed(ok)) return;
    Adjoint<T, MOEBIUS>(call, block, arena).run(looking);
  }, looking);
  if (given.g_lag && given.lag_summed) sum_rows<T>(lag, scan.rows, scan.heads, given.g_lag);
  if (given.g_initial_re && given.re_summed) sum_rows<T>(re, scan.rows, width, given.g_initial_re);
  if (given.g_initial_im && given.im_summed) sum_rows<T>(im, scan.rows, width, given.g_initial_im);
  return ok;
}

}  // namespace

bool oscillator_scan_backward(const OscillatorScanBackward& call, int threads, Watch* watch) {
  return KSSM_SCAN_KINDS(call.scan, backward, call, threads, watch);
}

KSSM_NAMESPACE_END
