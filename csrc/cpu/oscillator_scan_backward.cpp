// The adjoint of the oscillator scan on the CPU, in reverse time. Equations:
// kssm_kernels/ops/oscillator_scan/__init__.py.

#include <optional>

#include "entry_points.h"
#include "scan_adjoint.h"

KSSM_NAMESPACE_BEGIN

namespace {

// One row of a closed loop in reverse.
template <class T, bool MOEBIUS> class ClosedRow {
 public:
  using V = Vec<T>;
  static constexpr int64_t W = kLanes<T>, kChunk = Adjoint<T, MOEBIUS>::kChunk;

  static int64_t room(const OscillatorScan& scan, const Block<T>& b, const LoopWeights<T>& w) {
    return Adjoint<T, MOEBIUS>::room(scan, b) + LoopRow<T, MOEBIUS>::room(w, kChunk) + 4 * w.communities;
  }

  ClosedRow(const OscillatorScanBackward& call, const Block<T>& block, const LoopWeights<T>& w, Arena<T>& arena)
      : call_(call), w_(w), b_(block), adjoint(call, block, arena), loop(call.scan, block, w, kChunk, arena),
        g_field_(arena.zeros(2 * w.communities)), g_sums_(arena.zeros(2 * w.communities)) {}

  T* g_field() const { return g_field_; }
  T* g_sums() const { return g_sums_; }

  // The gradient of Y from that of F; what the gradients of C, U and k take from step t, number i of its chunk.
  void through_strength(int64_t t, int64_t i, Parts<T> seen) {
    const OscillatorScan& scan = call_.scan;
    const ScanLoopGradients& out = call_.loop;
    const int64_t M = w_.communities, step = b_.row * scan.steps + t, width = scan.heads * scan.oscillators;
    times_strength(w_, loop.strength(i), g_field_, g_sums_);
    if (out.v_re) b_.copy_out(code_of<T>(), seen.re, static_cast<T*>(pointer(out.v_re)) + step * width);
    if (out.v_im) b_.copy_out(code_of<T>(), seen.im, static_cast<T*>(pointer(out.v_im)) + step * width);
    write_parts(out.f, step, loop.field(i));
    write_parts(out.g_y, step, g_sums_);
    if (!out.g_listen) return;
    const T *const y = loop.sums(i), *const slope = loop.slope(i);
    for (int64_t m = 0; m < M; m += W) {
      const Complex<V> sum = {load(y + m), load(y + M + m)}, g = {load(g_field_ + m), load(g_field_ + M + m)};
      store(g_field_ + m, load(slope + m) * real_of(sum, g));
    }
    const int64_t code = scan.loop.listen.code, count = scan.loop.communities;
    store_row(code, element(pointer(out.g_listen), code, step * count), count, g_field_);
  }

 private:
  void write_parts(int64_t target, int64_t step, const T* parts) const {
    const int64_t count = call_.scan.loop.communities;
    if (!target) return;
    for (int64_t part = 0; part < 2; ++part) {
      T* const out = static_cast<T*>(pointer(target)) + (2 * step + part) * count;
      store_row(code_of<T>(), out, count, parts + part * w_.communities);
    }
  }

  const OscillatorScanBackward& call_;
  const LoopWeights<T>& w_;
  const Block<T>& b_;

 public:
  Adjoint<T, MOEBIUS> adjoint;
  LoopRow<T, MOEBIUS> loop;

 private:
  T *g_field_, *g_sums_;
};

// Rows of a closed loop side by side.
template <class T, bool MOEBIUS> class ClosedRows {
 public:
  static constexpr int64_t kChunk = Adjoint<T, MOEBIUS>::kChunk;

  static int64_t room(const OscillatorScan& scan, const RowBlocks<T>& blocks, const LoopWeights<T>& w) {
    return blocks.count * ClosedRow<T, MOEBIUS>::room(scan, blocks[0], w);
  }

  ClosedRows(const OscillatorScanBackward& call, const RowBlocks<T>& blocks, const LoopWeights<T>& w, Arena<T>& arena)
      : scan_(call.scan), w_(w), count_(blocks.count) {
    for (int64_t r = 0; r < count_; ++r) rows_[r].emplace(call, blocks[r], w_, arena);
  }

  void run(Watch* watch) {
    const int64_t length = Adjoint<T, MOEBIUS>::segment_steps(scan_);
    for (int64_t r = 0; r < count_; ++r) rows_[r]->adjoint.begin();
    for (int64_t first = (scan_.steps - 1) / length * length; scan_.steps && first >= 0; first -= length) {
      const int64_t last = first + length < scan_.steps ? first + length : scan_.steps;
      if (!load_states(first, last, watch)) return;
      for (int64_t t0 = first + (last - first - 1) / kChunk * kChunk; t0 >= first; t0 -= kChunk) {
        if (stopped(watch)) return;
        chunk(first, t0, last - t0 < kChunk ? last - t0 : kChunk);
      }
    }
    for (int64_t r = 0; r < count_; ++r) rows_[r]->adjoint.end();
  }

 private:
  bool stopped(Watch* watch) const { return watch && watch->stop(2 * kChunk * count_ * w_.inputs); }

  bool load_states(int64_t first, int64_t last, Watch* watch) {
    Track<T, MOEBIUS> tracks[kSideBySide];
    bool all = true;
    for (int64_t r = 0; r < count_; ++r) {
      all = rows_[r]->adjoint.load_kept_states(first, last);
      tracks[r] = rows_[r]->adjoint.track(rows_[r]->loop);
    }
    for (int64_t t0 = first; !all && t0 < last; t0 += kChunk) {
      if (stopped(watch)) return false;
      const int64_t steps = last - t0 < kChunk ? last - t0 : kChunk;
      closed_chunk(w_, tracks, count_, t0, steps);
      for (int64_t r = 0; r < count_; ++r) {
        tracks[r].states = tracks[r].states.row(steps, tracks[r].lanes);
        if (MOEBIUS) tracks[r].v = tracks[r].states;
      }
    }
    return true;
  }

  void chunk(int64_t first, int64_t t0, int64_t steps) {
    Parts<T> states[kSideBySide] = {};
    LoopStep<T> entries[kMostSteps] = {};
    for (int64_t r = 0; r < count_; ++r) {
      ClosedRow<T, MOEBIUS>& row = *rows_[r];
      states[r] = row.adjoint.begin_chunk(first, t0, steps);
      row.loop.load_strengths(t0, steps);
      for (int64_t i = 0; i < steps; ++i)
        entries[r * steps + i] = row.loop.step(t0 + i, i, i, row.adjoint.seen_before(t0 + i, i, states[r]));
    }
    close_loop(w_, entries, count_ * steps);
    for (int64_t i = steps - 1; i >= 0; --i) step(t0 + i, i, states);
    for (int64_t r = 0; r < count_; ++r) rows_[r]->adjoint.end_chunk(t0, steps);
  }

  void step(int64_t t, int64_t i, const Parts<T>* states) {
    const T *gradients[kSideBySide] = {}, *g_sums[2 * kSideBySide] = {};
    T *g_fields[kSideBySide] = {}, *seen[2 * kSideBySide] = {};
    for (int64_t r = 0; r < count_; ++r) {
      ClosedRow<T, MOEBIUS>& row = *rows_[r];
      if (scan_.forget.data) row.adjoint.run_of_states().set_forget(i, row.loop.forget(i));
      row.adjoint.one_step(t, i, states[r], row.loop.in_lanes(i));
      gradients[r] = row.adjoint.gradients();
      g_fields[r] = row.g_field();
      zero(g_fields[r], 2 * w_.communities);
      for (int64_t part = 0; part < 2; ++part) g_sums[2 * r + part] = row.g_sums() + part * w_.communities;
      const Parts<T> carry = row.adjoint.carry_seen();
      seen[2 * r] = carry.re;
      seen[2 * r + 1] = carry.im;
    }
    add_products(count_, w_.inputs, 2 * w_.communities, w_.by_input(), gradients, g_fields);
    for (int64_t r = 0; r < count_; ++r) {
      ClosedRow<T, MOEBIUS>& row = *rows_[r];
      row.through_strength(t, i, row.adjoint.seen_before(t, i, states[r]));
    }
    add_products(2 * count_, w_.communities, w_.lanes, w_.by_community(), g_sums, seen);
    for (int64_t r = 0; r < count_; ++r) rows_[r]->adjoint.hand_on(t);
  }

  const OscillatorScan& scan_;
  const LoopWeights<T>& w_;
  const int64_t count_;
  std::optional<ClosedRow<T, MOEBIUS>> rows_[kSideBySide];
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
  threads = worth_threads(work, threads);
  if (scan.loop.communities) {
    const LoopWeights<T> weights(scan, Block<T>(blocks.grid, 0, 0, scan.heads), ok);
    if (failed(ok)) return false;
    const int64_t together = rows_side_by_side(scan.rows, threads);
    parallel_for((scan.rows + together - 1) / together, threads, [&](int64_t i) {
      const int64_t first = i * together, count = scan.rows - first < together ? scan.rows - first : together;
      const RowBlocks<T> own(blocks.grid, scan.heads, first, count);
      Arena<T> arena(ClosedRows<T, MOEBIUS>::room(scan, own, weights), own[0], ok);
      if (failed(ok)) return;
      ClosedRows<T, MOEBIUS>(call, own, weights, arena).run(looking);
    }, looking);
  } else {
    parallel_for(blocks.count, threads, [&](int64_t i) {
      const Block<T> block = blocks.at(scan, i);
      Arena<T> arena(Adjoint<T, MOEBIUS>::room(scan, block), block, ok);
      if (failed(ok)) return;
      Adjoint<T, MOEBIUS>(call, block, arena).run(looking);
    }, looking);
  }
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
