// The oscillator scan on the CPU. Equations: kssm_kernels/ops/oscillator_scan/__init__.py.

#include <optional>

#include "entry_points.h"
#include "scan_loop.h"
#include "scan_readout.h"

KSSM_NAMESPACE_BEGIN

namespace {

// One block on its way through the steps.
template <class T, bool MOEBIUS> class Forward {
 public:
  static constexpr int64_t kChunk = Run<T, MOEBIUS>::kChunk;

  static int64_t room(const OscillatorScan& scan, const Block<T>& b) {
    return Run<T, MOEBIUS>::room(b) + Readout<T>::room(b, scan.harmonics) + (4 * kChunk + 5) * b.lanes;
  }

  Forward(const OscillatorScanForward& call, const Block<T>& block, Arena<T>& arena)
      : call_(call), b_(block), run_(call.scan, block, arena), readout_(call, block, arena) {
    const auto parts = [&](int64_t rows) { return Parts<T>{arena.take(rows * b_.lanes), arena.take(rows * b_.lanes)}; };
    states_ = parts(kChunk);
    mean_ = parts(1);
    v_ = MOEBIUS ? states_ : parts(kChunk);
    before_ = run_.start();
    seen_ = run_.seen_start();
    for (int64_t o = 0; o < b_.lanes; o += kLanes<T>) mean_.set(o, run_.start_mean().at(o));
  }

  void chunk(int64_t t0, int64_t count) {
    run_.chunk(t0, count, before_, mean_, states_, v_);
    keep(t0, count);
  }
  Track<T, MOEBIUS> track(LoopRow<T, MOEBIUS>& loop) {
    return {&run_, &loop, b_.lanes, before_, seen_, mean_, states_, v_};
  }

  // What is to be kept of a chunk that was computed.
  void keep(int64_t t0, int64_t count) {
    const OscillatorScan& scan = call_.scan;
    readout_.write(t0, count, v_);
    for (int64_t i = 0; scan.every && i < count; ++i) {
      const int64_t done = t0 + i + 1;
      if (done % scan.every) continue;
      const int64_t place = b_.row * (scan.steps / scan.every) + done / scan.every - 1;
      write(states_.row(i, b_.lanes), scan.states_re, scan.states_im, place);
    }
    before_ = states_.row(count - 1, b_.lanes);
    seen_ = v_.row(count - 1, b_.lanes);
  }

  void end() { write(call_.scan.steps ? before_ : run_.given(), call_.last_re, call_.last_im, b_.row); }

 private:
  void write(Parts<T> z, int64_t re, int64_t im, int64_t row) const {
    const int64_t place = row * call_.scan.heads * call_.scan.oscillators + b_.first * b_.grid.n;
    b_.copy_out(code_of<T>(), z.re, static_cast<T*>(pointer(re)) + place);
    b_.copy_out(code_of<T>(), z.im, static_cast<T*>(pointer(im)) + place);
  }

  const OscillatorScanForward& call_;
  const Block<T>& b_;
  Run<T, MOEBIUS> run_;
  Readout<T> readout_;
  Parts<T> states_, mean_, v_, before_, seen_;
};

template <class T, bool MOEBIUS>
void forward_block(const OscillatorScanForward& call, const Block<T>& b, bool& ok, Watch* watch) {
  constexpr int64_t C = Forward<T, MOEBIUS>::kChunk;
  Arena<T> arena(Forward<T, MOEBIUS>::room(call.scan, b), b, ok);
  if (failed(ok)) return;
  Forward<T, MOEBIUS> forward(call, b, arena);
  for (int64_t t0 = 0; t0 < call.scan.steps; t0 += C) {
    if (watch && watch->stop(C * b.lanes)) return;
    forward.chunk(t0, call.scan.steps - t0 < C ? call.scan.steps - t0 : C);
  }
  forward.end();
}

// Rows of a closed loop side by side.
template <class T, bool MOEBIUS>
void forward_rows(const OscillatorScanForward& call, const LoopWeights<T>& weights, const RowBlocks<T>& blocks,
                  bool& ok, Watch* watch) {
  constexpr int64_t C = Forward<T, MOEBIUS>::kChunk;
  const OscillatorScan& scan = call.scan;
  std::optional<LoopRow<T, MOEBIUS>> loops[kSideBySide];
  std::optional<Forward<T, MOEBIUS>> rows[kSideBySide];
  const int64_t count = blocks.count;
  const int64_t room = Forward<T, MOEBIUS>::room(scan, blocks[0]) + LoopRow<T, MOEBIUS>::room(weights, 1);
  Arena<T> arena(count * room, blocks[0], ok);
  if (failed(ok)) return;
  for (int64_t r = 0; r < count; ++r) {
    loops[r].emplace(scan, blocks[r], weights, 1, arena);
    rows[r].emplace(call, blocks[r], arena);
  }
  for (int64_t t0 = 0; t0 < scan.steps; t0 += C) {
    if (watch && watch->stop(C * count * weights.inputs)) return;
    const int64_t steps = scan.steps - t0 < C ? scan.steps - t0 : C;
    Track<T, MOEBIUS> tracks[kSideBySide];
    for (int64_t r = 0; r < count; ++r) tracks[r] = rows[r]->track(*loops[r]);
    closed_chunk(weights, tracks, count, t0, steps);
    for (int64_t r = 0; r < count; ++r) rows[r]->keep(t0, steps);
  }
  for (int64_t r = 0; r < count; ++r) rows[r]->end();
}

template <class T, bool MOEBIUS> bool forward(const OscillatorScanForward& call, int threads, Watch* watch) {
  const Blocks<T> blocks(call.scan, threads);
  const double work = scan_work<T>(call.scan);
  bool ok = true;
  Watch* const looking = watched(watch, work);
  const int64_t width = call.scan.heads * call.scan.oscillators, size = dtype_size(code_of<T>());
  const int64_t kept = call.scan.every ? call.scan.rows * (call.scan.steps / call.scan.every) * width * size : 0;
  for (const int64_t states : {call.scan.states_re, call.scan.states_im}) expect_writes(states, kept);
  threads = worth_threads(work, threads);
  if (!call.scan.loop.communities) {
    parallel_for(blocks.count, threads,
                 [&](int64_t i) { forward_block<T, MOEBIUS>(call, blocks.at(call.scan, i), ok, looking); }, looking);
    return ok;
  }
  const Grid<T> grid(call.scan.oscillators);
  const LoopWeights<T> weights(call.scan, Block<T>(grid, 0, 0, call.scan.heads), ok);
  if (failed(ok)) return false;
  const int64_t rows = call.scan.rows, together = rows_side_by_side(rows, threads);
  parallel_for((rows + together - 1) / together, threads, [&](int64_t i) {
    const int64_t first = i * together, count = rows - first < together ? rows - first : together;
    forward_rows<T, MOEBIUS>(call, weights, RowBlocks<T>(grid, call.scan.heads, first, count), ok, looking);
  }, looking);
  return ok;
}

}  // namespace

bool oscillator_scan_forward(const OscillatorScanForward& call, int threads, Watch* watch) {
  return KSSM_SCAN_KINDS(call.scan, forward, call, threads, watch);
}

KSSM_NAMESPACE_END
