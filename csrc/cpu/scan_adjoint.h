// The adjoint of the oscillator scan for one block, in reverse time. Equations:
// kssm_kernels/ops/oscillator_scan/__init__.py.
#pragma once

#include "scan_loop.h"

KSSM_NAMESPACE_BEGIN

template <class T, bool MOEBIUS> class Adjoint {
 public:
  using V = Vec<T>;
  static constexpr int64_t W = kLanes<T>, kChunk = Run<T, MOEBIUS>::kChunk;

  static int64_t room(const OscillatorScan& scan, const Block<T>& b) {
    const int64_t rows = segment_steps(scan) + 1;
    return Run<T, MOEBIUS>::room(b) + (2 * rows + 5 * (kChunk + 1) + 2 * kChunk + 20) * b.lanes + padded<T>(b.heads) +
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
    T* const outputs = arena.zeros(4 * L + padded<T>(b_.heads));
    for (int64_t k = 0; k < 5; ++k) outputs_[k] = outputs + k * L;
    rho_ = arena.take(kChunk * L);
    g_strength_ = arena.take(kChunk * L);
    for (T*& part : order_) part = arena.zeros(kChunk * scan_.harmonics * b_.heads + W);
    order_row_ = arena.take(scan_.harmonics * b_.heads);
    head_row_ = arena.zeros(kChunk * b_.heads);
    head_rho_ = arena.zeros(kChunk * b_.heads);
  }

  void run(Watch* watch) {
    begin();
    const int64_t length = segment_steps(scan_);
    for (int64_t first = (scan_.steps - 1) / length * length; scan_.steps && first >= 0; first -= length) {
      const int64_t last = first + length < scan_.steps ? first + length : scan_.steps;
      if (!load_states(first, last, watch)) return;
      for (int64_t t0 = first + (last - first - 1) / kChunk * kChunk; t0 >= first; t0 -= kChunk) {
        if (watch && watch->stop(3 * kChunk * b_.lanes)) return;
        const int64_t count = last - t0 < kChunk ? last - t0 : kChunk;
        const Parts<T> states = begin_chunk(first, t0, count);
        for (int64_t i = count - 1; i >= 0; --i) {
          one_step(t0 + i, i, states, run_.inputs(t0 + i));
          hand_on(t0 + i);
        }
        end_chunk(t0, count);
      }
    }
    end();
  }

  // ---- the parts of it, for rows that go through a closed loop side by side ----

  // Steps whose states are held at once: a chunk of those that were kept, or what lies between two that were.
  static int64_t segment_steps(const OscillatorScan& scan) {
    return scan.every <= 1 ? kChunk : scan.every < scan.steps ? scan.every : scan.steps > 0 ? scan.steps : 1;
  }

  Run<T, MOEBIUS>& run_of_states() { return run_; }
  Parts<T> carry_seen() const { return carry_seen_; }
  T* gradients() const { return outputs_[0]; }  // of a step's p, q, gate, phase, [lanes] each, and forget, [heads]

  void begin() { load(call_.g_last_re, call_.g_last_im, b_.row * width_ + column_, carry_); }

  // Those of the states of steps `first` .. `last` that were kept; true if these are all.
  bool load_kept_states(int64_t first, int64_t last) {
    if (scan_.every == 1) {
      for (int64_t t = first; t <= last; ++t) load_kept(t, states_.row(t - first, b_.lanes));
      return true;
    }
    load_kept(first, states_);
    run_.see(states_, v_, run_mean_);
    return false;
  }
  // The way through the others, which is still to go.
  Track<T, MOEBIUS> track(LoopRow<T, MOEBIUS>& loop) {
    const Parts<T> after = states_.row(1, b_.lanes);
    return {&run_, &loop, b_.lanes, states_, MOEBIUS ? states_ : v_, run_mean_, after, MOEBIUS ? after : v_};
  }

  // What the field and the loop see of the state before step t, number i of its chunk.
  Parts<T> seen_before(int64_t t, int64_t i, Parts<T> states) const {
    return run_.is_reset(t) ? run_.seen_start() : seen_row(states, i);
  }

  // Before the steps of a chunk in reverse, which end_chunk follows. Returns the states: rows 0 .. count, before the
  // first and after each.
  Parts<T> begin_chunk(int64_t first, int64_t t0, int64_t count) {
    const Parts<T> states = states_.row(t0 - first, b_.lanes);
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
    return states;
  }

  // Step t, number i of its chunk, of inputs that lie in lanes; hand_on follows.
  void one_step(int64_t t, int64_t i, Parts<T> states, const typename Run<T, MOEBIUS>::Inputs& in) {
    const bool reset = run_.is_reset(t);
    const Parts<T> before = reset ? run_.start() : states.row(i, b_.lanes), after = states.row(i + 1, b_.lanes);
    const Parts<T> mean = reset ? run_.start_mean() : mean_.row(i, b_.lanes), shown = seen_row(states, i + 1);
    const bool read = reads();
    const bool given = scan_.every == 1 && (call_.g_states_re || call_.g_states_im);
    if (given) load(call_.g_states_re, call_.g_states_im, (b_.row * scan_.steps + t) * width_ + column_, given_);
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
    else if (scan_.loop.communities) zero_carry_seen();
    if (scan_.loop.communities) finish_gradients(i);
  }

  // The gradient of the state before step t goes to the step before, or to the initial state.
  void hand_on(int64_t t) {
    if (t == 0 || run_.is_reset(t)) to_initial();
  }

  void end_chunk(int64_t t0, int64_t count) {
    const HeadRows<T>& heads = run_.heads();
    const int64_t total = count * b_.heads;
    if (!scan_.loop.communities)
      for (int64_t i = 0; i < count; ++i) sum_rho(i);
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

  void end() const {
    const Parts<T> found = scan_.steps ? initial_ : carry_;
    store_start(found.re, call_.g_initial_re);
    store_start(found.im, call_.g_initial_im);
    if (call_.g_lag) {
      T* const target = static_cast<T*>(pointer(call_.g_lag)) + b_.row * scan_.heads + b_.first;
      for (int64_t h = 0; h < b_.heads; ++h) target[h] = lag_[h * b_.grid.group];
    }
  }

 private:
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
    if (load_kept_states(first, last)) return true;
    for (int64_t t0 = first; t0 < last; t0 += kChunk) {
      if (watch && watch->stop(kChunk * b_.lanes)) return false;
      const Parts<T> before = states_.row(t0 - first, b_.lanes);
      const Parts<T> after = states_.row(t0 - first + 1, b_.lanes);
      run_.chunk(t0, last - t0 < kChunk ? last - t0 : kChunk, before, run_mean_, after, MOEBIUS ? after : v_);
    }
    return true;
  }

  Parts<T> seen_row(Parts<T> states, int64_t i) const { return (MOEBIUS ? states : v_).row(i, b_.lanes); }

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

  // The sum of rho over each head.
  void sum_rho(int64_t i) {
    if (!run_.keeps()) return;
    b_.head_sums(rho_ + i * b_.lanes, T(1), rho_ + i * b_.lanes);
    for (int64_t h = 0; h < b_.heads; ++h) head_rho_[i * b_.heads + h] = rho_[i * b_.lanes + h * b_.grid.group];
  }

  void zero_carry_seen() {
    for (T* part : {carry_seen_.re, carry_seen_.im}) zero(part, b_.lanes);
  }

  // Of a step's inputs, as the loop takes them: zero in lanes without an oscillator, and with those of forget.
  void finish_gradients(int64_t i) {
    for (int64_t k = 0; k < 4; ++k) b_.only_live(outputs_[k]);
    sum_rho(i);
    if (!scan_.forget.data) return;
    for (int64_t h = 0; h < b_.heads; ++h) {
      const int64_t at = i * b_.heads + h;
      outputs_[4][h] = -(T(1) - run_.heads().forget[at]) * head_rho_[at];
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
    T* const direct = memory && !scan_.loop.communities ? b_.lanes_at(code(k), memory) : nullptr;
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
  T *factor_, *lag_, *outputs_[5], *rho_, *g_strength_, *order_[2], *order_row_, *head_row_, *head_rho_;
};

KSSM_NAMESPACE_END
