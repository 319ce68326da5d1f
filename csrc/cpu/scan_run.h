// The oscillator scan over the steps of one block, a chunk of steps at a time: what forward does, and what backward does
// again where states were not kept. The state lies in the first-level cache between steps. A step's chain of dependent
// operations takes longer than the state's way there: the gates of the next steps, which need no state, fill that time.
#pragma once

#include "scan_block.h"
#include "trig.h"

#include "../math/oscillator_step.h"

KSSM_NAMESPACE_BEGIN

// Parts of complex numbers, in lanes.
template <class T> struct Parts {
  T *re, *im;

  KSSM_FN Complex<Vec<T>> at(int64_t o) const { return {load(re + o), load(im + o)}; }
  KSSM_FN void set(int64_t o, Complex<Vec<T>> z) const {
    store(re + o, z.re);
    store(im + o, z.im);
  }
  Parts row(int64_t i, int64_t lanes) const { return {re + i * lanes, im + i * lanes}; }
};

KSSM_FN const void* at(const ScanSequence& x, int64_t row, int64_t t, int64_t column) {
  return element(pointer(x.data), x.code, row * x.row_stride + t * x.time_stride + column);
}

// A chunk's logits of heads, and what is made of them: [steps, heads] and, in lanes, [steps, lanes].
template <class T> struct HeadRows {
  T *strength, *slope, *forget;  // K, dK/dk, f, one for each head
  T *keep_lanes, *strength_lanes;
};

template <class T, bool MOEBIUS> class Run {
 public:
  using V = Vec<T>;
  static constexpr int64_t W = kLanes<T>, kChunk = W;

  // Elements of the arena that a run takes.
  static int64_t room(const Block<T>& b) {
    return (14 + 2 * (kChunk + 1)) * b.lanes + (3 * b.heads + 5) * kChunk + 16 * W;
  }

  Run(const OscillatorScan& scan, const Block<T>& block, Arena<T>& arena)
      : scan_(scan), b_(block), coupled_(scan.coupling.data != 0), keeps_(scan.forget.data || scan.tied_leak) {
    for (T*& copy : inputs_) copy = arena.take(b_.lanes);
    for (T** rows : {&heads_.strength, &heads_.slope, &heads_.forget}) *rows = arena.zeros(kChunk * b_.heads + W);
    heads_.keep_lanes = arena.take(kChunk * b_.lanes);
    heads_.strength_lanes = arena.take(kChunk * b_.lanes);
    for (Parts<T>* p : {&given_, &start_, &seen_start_, &start_mean_, &lag_})
      *p = {arena.zeros(b_.lanes), arena.zeros(b_.lanes)};
    load_start();
  }

  bool coupled() const { return coupled_; }
  bool keeps() const { return keeps_; }
  bool forgets() const { return scan_.forget.data != 0; }
  bool has_lag() const { return scan_.start.phase_lag != 0; }
  const HeadRows<T>& heads() const { return heads_; }
  // The initial state as it was given, as the first step takes it, and the mean of what the field sees of that.
  Parts<T> given() const { return given_; }
  Parts<T> start() const { return start_; }
  Parts<T> seen_start() const { return seen_start_; }
  Parts<T> start_mean() const { return start_mean_; }
  Parts<T> lag() const { return lag_; }

  bool is_reset(int64_t t) const {
    return scan_.reset && static_cast<const uint8_t*>(pointer(scan_.reset))[b_.row * scan_.steps + t];
  }

  // What a chunk takes from the logits of its heads.
  void load_heads(int64_t t0, int64_t count) {
    const int64_t total = count * b_.heads;
    if (coupled_) {
      load_logits(scan_.coupling, t0, count, heads_.strength);
      for (int64_t i = 0; i < total; i += W) {
        const V k = load(heads_.strength + i);
        const Gate<V> g = sigmoid(k);
        store(heads_.strength + i, MOEBIUS ? softplus(k) : g.open);
        store(heads_.slope + i, MOEBIUS ? g.open : g.open * g.shut);
        if (scan_.tied_leak) store(heads_.forget + i, g.shut);  // here 1 - K
      }
      expand(heads_.strength, count, heads_.strength_lanes);
      for (int64_t i = 0; i < count; ++i) b_.only_live(heads_.strength_lanes + i * b_.lanes);
      if (scan_.tied_leak) expand(heads_.forget, count, heads_.keep_lanes);
    }
    if (scan_.forget.data && !scan_.loop.communities) {
      load_logits(scan_.forget, t0, count, heads_.forget);
      for (int64_t i = 0; i < total; i += W) store(heads_.forget + i, sigmoid(load(heads_.forget + i)).shut);
      expand(heads_.forget, count, heads_.keep_lanes);  // here 1 - f
    }
  }

  // The same for one step's forget logits.
  void set_forget(int64_t i, const T* logits) {
    T* const forget = heads_.forget + i * b_.heads;
    for (int64_t h = 0; h < b_.heads; h += W) {  // the next step's lie behind the last one
      const V shut = sigmoid(load(logits + h)).shut;
      const int64_t count = b_.heads - h < W ? b_.heads - h : W;
      __builtin_memcpy(forget + h, &shut, sizeof(T) * static_cast<size_t>(count));
    }
    b_.expand(forget, heads_.keep_lanes + i * b_.lanes);
  }

  // Where a step's p, q, gate and phase lie in lanes.
  struct Inputs {
    const T* x[4];
  };
  Inputs inputs(int64_t t) const {
    Inputs found;
    const ScanSequence* const sequences[4] = {&scan_.p, &scan_.q, &scan_.gate, &scan_.phase};
    for (int k = 0; k < 4; ++k)
      found.x[k] = b_.in_lanes(sequences[k]->code, at(*sequences[k], b_.row, t, b_.first * b_.grid.n), inputs_[k]);
    return found;
  }
  KSSM_FN WriteGates<V> gates(const Inputs& in, int64_t i, int64_t o) const {
    const V phase[1] = {load(in.x[3] + o)};
    V sin[1], cos[1];
    sincos<T, 1>(phase, sin, cos);
    const V keep = keeps_ ? load(heads_.keep_lanes + i * b_.lanes + o) : splat<V>(T(1));
    return write_gates<MOEBIUS>(load(in.x[0] + o), load(in.x[1] + o), load(in.x[2] + o), sin[0], cos[0], keep);
  }
  KSSM_FN V strength(int64_t i, int64_t o) const { return load(heads_.strength_lanes + i * b_.lanes + o); }
  // exp(-i alpha) Z
  KSSM_FN Complex<V> turned(Parts<T> mean, int64_t o) const {
    return has_lag() ? times_conjugate(mean.at(o), lag_.at(o)) : mean.at(o);
  }

  // v of a state, and its mean over each head if there is a coupling; v is the state itself for moebius.
  Parts<T> see(Parts<T> z, Parts<T> v, Parts<T> mean) const {
    if constexpr (MOEBIUS) v = z;
    else
      for (int64_t o = 0; o < b_.lanes; o += W) v.set(o, seen<MOEBIUS>(z.at(o)));
    if (coupled_) means(v, mean);
    return v;
  }
  void means(Parts<T> v, Parts<T> mean) const {
    const T share = T(1) / static_cast<T>(b_.grid.n);
    b_.head_sums(v.re, share, mean.re);
    b_.head_sums(v.im, share, mean.im);
  }

  // Steps t0 .. t0 + count - 1, count <= kChunk, from the state `before`, whose mean `mean` is, and becomes that of the
  // last state: states [count, lanes], and v likewise, which is the states for moebius.
  void chunk(int64_t t0, int64_t count, Parts<T> before, Parts<T> mean, Parts<T> states, Parts<T> v) {
    load_heads(t0, count);
    for (int64_t i = 0; i < count; ++i) {
      const Parts<T> after = states.row(i, b_.lanes);
      one_step(t0 + i, i, inputs(t0 + i), before, mean, after, v.row(i, b_.lanes));
      before = after;
    }
  }
  // Step t, number i of its chunk, of inputs that lie in lanes.
  void one_step(int64_t t, int64_t i, const Inputs& in, Parts<T> before, Parts<T> mean, Parts<T> after, Parts<T> v) const {
    const bool reset = is_reset(t);
    const Parts<T> from = reset ? start_ : before, field = reset ? start_mean_ : mean;
    for (int64_t o = 0; o < b_.lanes; o += W) {
      const WriteGates<V> g = gates(in, i, o);
      Complex<V> force = g.d;
      if (coupled_) force = force + strength(i, o) * turned(field, o);
      const Complex<V> z = step<MOEBIUS>(g.lam * from.at(o), force);
      after.set(o, z);
      if constexpr (!MOEBIUS) v.set(o, seen<MOEBIUS>(z));
    }
    if (coupled_) means(MOEBIUS ? after : v, mean);
  }

 private:
  void load_logits(const ScanSequence& x, int64_t t0, int64_t count, T* out) const {
    for (int64_t i = 0; i < count; ++i)
      load_row(x.code, at(x, b_.row, t0 + i, b_.first), 1, b_.heads, out + i * b_.heads);
  }
  void expand(const T* values, int64_t count, T* lanes) const {
    for (int64_t i = 0; i < count; ++i) b_.expand(values + i * b_.heads, lanes + i * b_.lanes);
  }

  void load_start() {
    const ScanStart& s = scan_.start;
    const int64_t column = b_.first * b_.grid.n;
    if (s.initial_re) {
      b_.copy_in(code_of<T>(), static_cast<const T*>(pointer(s.initial_re)) + b_.row * s.re_stride + column, given_.re);
      b_.copy_in(code_of<T>(), static_cast<const T*>(pointer(s.initial_im)) + b_.row * s.im_stride + column, given_.im);
      for (int64_t o = 0; o < b_.lanes; o += W) start_.set(o, kssm::KSSM_ISA::start<MOEBIUS>(given_.at(o)));
      see_start();
    }
    if (has_lag()) {
      const T* const given = static_cast<const T*>(pointer(s.phase_lag)) + b_.row * s.lag_stride + b_.first;
      for (int64_t h = 0; h < b_.heads; ++h) heads_.strength[h] = given[h];
      b_.expand(heads_.strength, lag_.re);
      for (int64_t o = 0; o < b_.lanes; o += W) {
        const V alpha[1] = {load(lag_.re + o)};
        V sin[1], cos[1];
        sincos<T, 1>(alpha, sin, cos);
        lag_.set(o, {cos[0], sin[0]});
      }
    }
  }
  void see_start() {
    for (int64_t o = 0; o < b_.lanes; o += W) seen_start_.set(o, seen<MOEBIUS>(start_.at(o)));
    if (coupled_) means(seen_start_, start_mean_);
  }

  const OscillatorScan& scan_;
  const Block<T>& b_;
  const bool coupled_, keeps_;
  T* inputs_[4];
  HeadRows<T> heads_;
  Parts<T> given_, start_, seen_start_, start_mean_, lag_;
};

// Blocks of a call, and what takes the place of one number of vectors in a block: as many as four, for what they share,
// as long as every thread has a block.
template <class T> struct Blocks {
  Blocks(const OscillatorScan& scan, int threads) : grid(scan.oscillators) {
    const int64_t all = grid.joint() ? scan.heads : (scan.heads * grid.group + kLanes<T> - 1) / kLanes<T>;
    int64_t vectors = 4;
    while (vectors > 1 && scan.rows * ((all + vectors - 1) / vectors) < 2 * threads) vectors /= 2;
    heads = grid.heads_in(vectors);
    per_row = (scan.heads + heads - 1) / heads;
    count = scan.rows * per_row;
  }
  Block<T> at(const OscillatorScan& scan, int64_t i) const {
    const int64_t first = i % per_row * heads;
    return {grid, i / per_row, first, scan.heads - first < heads ? scan.heads - first : heads};
  }

  Grid<T> grid;
  int64_t heads, per_row, count;
};

// body<T, MOEBIUS>(..) for the call's dtype and kind.
#define KSSM_SCAN_KINDS(scan, body, ...)                                                              \
  ((scan).code == kFloat64 ? ((scan).moebius ? body<double, true>(__VA_ARGS__) : body<double, false>(__VA_ARGS__)) \
                           : ((scan).moebius ? body<float, true>(__VA_ARGS__) : body<float, false>(__VA_ARGS__)))

// Vector operations of a call, about: a hundred for each vector of oscillators and step, more with many harmonics and
// with communities.
template <class T> double scan_work(const OscillatorScan& scan) {
  return static_cast<double>(scan.rows * scan.steps * scan.heads * scan.oscillators) / kLanes<T> *
         static_cast<double>(100 + 6 * scan.harmonics + 10 * scan.loop.communities);
}

KSSM_NAMESPACE_END
