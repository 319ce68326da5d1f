// What closes the loop of an oscillator scan: sums over communities of oscillators move the inputs of the next step.
// Some rows go through the steps side by side, so that the weights, which lie in the second-level cache, are read once
// for all of them. Numbers of one row: D in lanes, as its block has them; M communities, padded to whole vectors.
#pragma once

#include <optional>

#include "products.h"
#include "scan_run.h"

KSSM_NAMESPACE_BEGIN

// C and U with their columns and rows where a block's lanes are, zeros elsewhere, and both transposed.
template <class T> class LoopWeights {
 public:
  static constexpr int64_t W = kLanes<T>;

  LoopWeights(const OscillatorScan& scan, const Block<T>& b, bool& ok)
      : communities(padded<T>(scan.loop.communities)), lanes(b.lanes),
        inputs(4 * b.lanes + (scan.forget.data ? padded<T>(b.heads) : 0)),
        c_(communities * lanes, ok), u_(inputs * 2 * communities, ok), by_lanes_(communities * lanes, ok),
        by_communities_(2 * communities * inputs, ok) {
    if (failed(ok)) return;
    const int64_t M = scan.loop.communities, width = scan.heads * scan.oscillators;
    const T* const c = static_cast<const T*>(pointer(scan.loop.c));
    const T* const u = static_cast<const T*>(pointer(scan.loop.u));
    zero<T>(c_, communities * lanes);
    zero<T>(u_, inputs * 2 * communities);
    for (int64_t m = 0; m < M; ++m) b.copy_in(code_of<T>(), c + m * width, c_ + m * lanes);
    const size_t bytes = sizeof(T) * static_cast<size_t>(M);
    const auto copy_row = [&](int64_t from, int64_t to) {
      for (int64_t part = 0; part < 2; ++part)
        __builtin_memcpy(u_ + (2 * to + part) * communities, u + (2 * from + part) * M, bytes);
    };
    for (int64_t k = 0; k < 4; ++k)
      for (int64_t h = 0; h < b.heads; ++h)
        for (int64_t j = 0; j < b.grid.n; ++j) copy_row(k * width + h * b.grid.n + j, k * lanes + h * b.grid.group + j);
    for (int64_t h = 0; scan.forget.data && h < b.heads; ++h) copy_row(4 * width + h, 4 * lanes + h);
    transposed(c_, communities, lanes, by_lanes_);
    transposed(u_, inputs, 2 * communities, by_communities_);
  }

  const T* by_community() const { return c_; }      // [communities, lanes]
  const T* by_lane() const { return by_lanes_; }    // [lanes, communities]
  const T* by_input() const { return u_; }          // [inputs, 2 communities]
  const T* by_sum() const { return by_communities_; }  // [2 communities, inputs]

  const int64_t communities, lanes, inputs;

 private:
  static void transposed(const T* x, int64_t rows, int64_t columns, T* out) {
    for (int64_t i = 0; i < rows; i += W) {
      for (int64_t j = 0; j < columns; j += W) {
        Vec<T> block[W];
        rows_to_lanes<T>([&](int64_t r) { return x + (i + r) * columns + j; }, W, block);
        for (int64_t c = 0; c < W; ++c) store(out + (j + c) * rows + i, block[c]);
      }
    }
  }

  Buffer<T> c_, u_, by_lanes_, by_communities_;
};

// Rows that go through the steps side by side, and the most steps of them whose products are taken at once.
constexpr int64_t kSideBySide = products::kRows, kMostSteps = kSideBySide * 16;

// The loop's part in a step of one row.
template <class T> struct LoopStep {
  Parts<T> v;         // of the state before, [lanes]
  const T* strength;  // K', [communities]
  T *sums, *field;    // Y and F, [2 communities]
  T* inputs;          // p, q, gate, phase, [lanes] each, and forget, [heads]: what they move
};

// Numbers of one row in the loop, for the steps of a chunk or one after another.
template <class T, bool MOEBIUS> class LoopRow {
 public:
  using V = Vec<T>;
  static constexpr int64_t W = kLanes<T>, kChunk = Run<T, MOEBIUS>::kChunk;

  static int64_t room(const LoopWeights<T>& w, int64_t steps) {
    return steps * (w.inputs + 4 * w.communities) + 2 * kChunk * w.communities;
  }

  LoopRow(const OscillatorScan& scan, const Block<T>& block, const LoopWeights<T>& weights, int64_t steps,
          Arena<T>& arena)
      : scan_(scan), b_(block), w_(weights), listens_(scan.loop.listen.data != 0) {
    strength_ = arena.zeros(kChunk * w_.communities);
    slope_ = arena.zeros(kChunk * w_.communities);
    sums_ = arena.take(steps * 2 * w_.communities);
    field_ = arena.take(steps * 2 * w_.communities);
    inputs_ = arena.zeros(steps * w_.inputs);
    if (!listens_)
      for (int64_t i = 0; i < kChunk * w_.communities; i += W) store(strength_ + i, splat<V>(T(1)));
  }

  void load_strengths(int64_t t0, int64_t count) {
    if (!listens_) return;
    for (int64_t i = 0; i < count; ++i) {
      T *const strength = strength_ + i * w_.communities, *const slope = slope_ + i * w_.communities;
      load_row(scan_.loop.listen.code, at(scan_.loop.listen, b_.row, t0 + i, 0), 1, scan_.loop.communities, strength);
      for (int64_t m = 0; m < w_.communities; m += W) {
        const Gate<V> gate = sigmoid(load(strength + m));
        store(strength + m, gate.open);
        store(slope + m, gate.open * gate.shut);
      }
    }
  }

  // Step t, number i of its chunk, with the inputs that are given; `place`: where its numbers lie.
  LoopStep<T> step(int64_t t, int64_t i, int64_t place, Parts<T> v) const {
    const LoopStep<T> s = {v, strength_ + i * w_.communities, sums(place), field(place), inputs(place)};
    const ScanSequence* const sequences[4] = {&scan_.p, &scan_.q, &scan_.gate, &scan_.phase};
    for (int64_t k = 0; k < 4; ++k)
      b_.copy_in(sequences[k]->code, at(*sequences[k], b_.row, t, 0), s.inputs + k * b_.lanes);
    if (scan_.forget.data) load_row(scan_.forget.code, at(scan_.forget, b_.row, t, 0), 1, b_.heads, forget(place));
    return s;
  }

  bool listens() const { return listens_; }
  const T* strength(int64_t i) const { return strength_ + i * w_.communities; }
  const T* slope(int64_t i) const { return slope_ + i * w_.communities; }
  T* sums(int64_t place) const { return sums_ + place * 2 * w_.communities; }
  T* field(int64_t place) const { return field_ + place * 2 * w_.communities; }
  T* inputs(int64_t place) const { return inputs_ + place * w_.inputs; }
  T* forget(int64_t place) const { return inputs(place) + 4 * b_.lanes; }
  typename Run<T, MOEBIUS>::Inputs in_lanes(int64_t place) const {
    const T* const x = inputs(place);
    return {{x, x + b_.lanes, x + 2 * b_.lanes, x + 3 * b_.lanes}};
  }

 private:
  const OscillatorScan& scan_;
  const Block<T>& b_;
  const LoopWeights<T>& w_;
  const bool listens_;
  T *strength_, *slope_, *sums_, *field_, *inputs_;
};

// out = K' x in both parts, [2 communities]
template <class T> void times_strength(const LoopWeights<T>& w, const T* strength, const T* x, T* out) {
  for (int64_t part = 0; part < 2 * w.communities; part += w.communities)
    for (int64_t m = 0; m < w.communities; m += kLanes<T>)
      store(out + part + m, load(strength + m) * load(x + part + m));
}

// Y and F of `count` steps of any rows, and what they move.
template <class T> void close_loop(const LoopWeights<T>& w, const LoopStep<T>* steps, int64_t count) {
  const int64_t M = w.communities;
  const T *seen[2 * kMostSteps] = {}, *fields[kMostSteps] = {};
  T *sums[2 * kMostSteps] = {}, *inputs[kMostSteps] = {};
  for (int64_t i = 0; i < count; ++i) {
    const LoopStep<T>& s = steps[i];
    seen[2 * i] = s.v.re;
    seen[2 * i + 1] = s.v.im;
    sums[2 * i] = s.sums;
    sums[2 * i + 1] = s.sums + M;
    fields[i] = s.field;
    inputs[i] = s.inputs;
    zero(s.sums, 2 * M);
  }
  add_products(2 * count, w.lanes, M, w.by_lane(), seen, sums);
  for (int64_t i = 0; i < count; ++i) times_strength(w, steps[i].strength, steps[i].sums, steps[i].field);
  add_products(count, 2 * M, w.inputs, w.by_sum(), fields, inputs);
}

// One row on its way through the steps: what Run::chunk takes, and in `seen` the v of `before`.
template <class T, bool MOEBIUS> struct Track {
  Run<T, MOEBIUS>* run;
  LoopRow<T, MOEBIUS>* loop;
  int64_t lanes;
  Parts<T> before, seen, mean, states, v;
};

// Run::chunk for rows side by side, in a closed loop.
template <class T, bool MOEBIUS>
void closed_chunk(const LoopWeights<T>& w, Track<T, MOEBIUS>* rows, int64_t count, int64_t t0, int64_t steps) {
  LoopStep<T> loops[kSideBySide] = {};
  for (int64_t r = 0; r < count; ++r) {
    rows[r].run->load_heads(t0, steps);
    rows[r].loop->load_strengths(t0, steps);
  }
  for (int64_t i = 0; i < steps; ++i) {
    for (int64_t r = 0; r < count; ++r) {
      Track<T, MOEBIUS>& row = rows[r];
      loops[r] = row.loop->step(t0 + i, i, 0, row.run->is_reset(t0 + i) ? row.run->seen_start() : row.seen);
    }
    close_loop(w, loops, count);
    for (int64_t r = 0; r < count; ++r) {
      Track<T, MOEBIUS>& row = rows[r];
      if (row.run->forgets()) row.run->set_forget(i, row.loop->forget(0));
      const Parts<T> after = row.states.row(i, row.lanes), v = row.v.row(i, row.lanes);
      row.run->one_step(t0 + i, i, row.loop->in_lanes(0), row.before, row.mean, after, v);
      row.before = after;
      row.seen = MOEBIUS ? after : v;
    }
  }
}

// Whole rows as blocks.
template <class T> struct RowBlocks {
  RowBlocks(const Grid<T>& grid, int64_t heads, int64_t first, int64_t rows) : count(rows) {
    for (int64_t r = 0; r < count; ++r) blocks[r].emplace(grid, first + r, 0, heads);
  }
  const Block<T>& operator[](int64_t r) const { return *blocks[r]; }

  const int64_t count;
  std::optional<Block<T>> blocks[kSideBySide];
};

// Rows of a call that go side by side: as many as pay, as long as every thread has some.
inline int64_t rows_side_by_side(int64_t rows, int threads) {
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t groups = (share + kSideBySide - 1) / kSideBySide;  // of a thread
  return groups > 0 ? (share + groups - 1) / groups : 1;
}

KSSM_NAMESPACE_END
