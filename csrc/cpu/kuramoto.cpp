// Mean-field phase update and order parameters of the updated phases, row by row, and their adjoint. Equations:
// kssm_kernels/ops/kuramoto/__init__.py. Rows of up to kRowBlock oscillators are shared among the threads in chunks;
// a longer row has all threads to itself (kuramoto_long.cpp). The steps are taken row by row; the features, and their
// adjoint, of short rows as many at a time as a vector has lanes.

#include "entry_points.h"
#include "harmonic_sums.h"
#include "kuramoto_long.h"
#include "kuramoto_row.h"

KSSM_NAMESPACE_BEGIN

namespace {


KSSM_FN double work(const KuramotoCall& call) {
  const double per_oscillator = 2.0 * call.harmonics + 20 + 30.0 * static_cast<double>(call.steps);
  return static_cast<double>(call.rows) * static_cast<double>(call.n) * per_oscillator / kLanes<float>;
}

struct Plan : Chunks {
  Plan(const KuramotoCall& call, int64_t rows_together)
      : Chunks(call.rows, rows_together), threads(worth_threads(work(call), call.threads)) {}

  int threads;
};

template <class T> void load_theta(const KuramotoCall& call, int64_t row, T* out) {
  const OperandRows& theta = call.operands[kTheta];
  load_row<T>(call.code, element(theta.data, call.code, row * theta.row_stride), theta.column_stride, call.n, out);
}

// The phases of one row, to be read in whole vectors: where they lie, or in scratch.
template <class T> const T* theta_row(const KuramotoCall& call, int64_t row, T* scratch) {
  const OperandRows& theta = call.operands[kTheta];
  return whole_row<T>(call.code, element(theta.data, call.code, row * theta.row_stride), theta.column_stride, call.n,
                      scratch);
}

// One vector of phases that all rows start from: its mean field is computed once per chunk.
KSSM_FN bool starts_alike(const KuramotoCall& call) { return call.operands[kTheta].row_stride == 0 && call.steps == 1; }

// The features of a set of rows that the steps have left in `state`.
template <class T> class Features {
 public:
  Features(const KuramotoCall& call, void* data, const Plan& plan, bool& ok)
      : call_(call), data_(data), in_lanes_(plan.together > 1),
        row_work_(in_lanes_ ? 0 : call.harmonics, ok), lane_work_(in_lanes_ ? call.harmonics : 0, ok) {}

  void put(int64_t first, int64_t last, const T* const* state, bool& ok) {
    const int64_t count = 3 * call_.harmonics;
    if (!in_lanes_) {
      row_features<T>(
          call_.n, call_.harmonics, 1, [&](int64_t begin, int64_t, T*) { return state[0] + begin; }, row_work_,
          call_.code, element(data_, call_.code, first * count), ok, nullptr);
      return;
    }
    T* rows[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = lane_work_.rows[i];
    lane_features<T>(state, call_.n, call_.harmonics, lane_work_, rows);
    for (int64_t r = first; r < last; ++r)
      store_row<T>(call_.code, element(data_, call_.code, r * count), count, rows[r - first]);
  }

 private:
  const KuramotoCall& call_;
  void* const data_;
  const bool in_lanes_;
  FeatureWork<T> row_work_;
  LaneWork<T> lane_work_;
};

template <class T> bool forward(const KuramotoCall& call, void* features, void* phases) {
  const Plan plan(call, call.harmonics ? rows_together<T>(call.n) : 1);
  bool ok = true;
  parallel_for(plan.count, plan.threads, [&](int64_t chunk) {
    RowBuffer<T> start(call.n, ok);
    Rows<T> theta(plan.together, call.n, ok);
    KuramotoRow<T> row(call, ok);
    Features<T> feature_rows(call, features, plan, ok);
    Mean<T> z{};
    bool started = false;
    // the phases are written where they are wanted if the kernel may write whole vectors there
    const bool in_place = phases && whole_vectors<T>(call.code, 1, call.n);
    for (int64_t first = plan.first(chunk); first < plan.last(chunk) && !failed(ok); first += plan.together) {
      const int64_t last = plan.end_of(first + plan.together);
      const T* ends[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) ends[i] = theta[0];  // a set without its last rows
      for (int64_t r = first; r < last; ++r) {
        row.set_row(r);
        T* const end = in_place ? static_cast<T*>(phases) + r * call.n : theta[r - first];
        const T* state = end;
        if (call.steps == 0) load_theta<T>(call, r, end);
        else state = row.start(theta_row<T>(call, r, start), true);
        for (int64_t s = 0; s < call.steps && !row.stopped(); ++s) {
          if (!started || !starts_alike(call)) z = row.mean_field(state);
          row.advance(state, z, s, end);
          state = end;
        }
        started = true;
        if (phases && !in_place) store_row<T>(call.code, element(phases, call.code, r * call.n), call.n, end);
        ends[r - first] = end;
      }
      if (call.harmonics) feature_rows.put(first, last, ends, ok);
    }
  }, call.watch);
  return ok;
}

// ---- backward ----

// Gradients of one operand: summed over rows in one partial result per chunk, then over chunks in order.
template <class T> class GradientSum {
 public:
  GradientSum(const GradientTarget& target, int64_t code, int64_t n, int64_t chunks, bool& ok)
      : target_(target), code_(code), n_(n), chunks_(chunks), columns_(shared_columns() ? chunks * n : 0, ok),
        scalars_(shared_scalar() ? chunks : 0, ok) {
    if (failed(ok)) return;
    for (int64_t i = 0; i < (shared_columns() ? chunks * n : 0); ++i) columns_[i] = T(0);
    for (int64_t i = 0; i < (shared_scalar() ? chunks : 0); ++i) scalars_[i] = 0.0;
  }
  bool wanted() const { return target_.data != nullptr; }

  void add(const KuramotoRow<T>& row, int64_t chunk, int64_t r, const T* g) {
    if (!wanted()) return;
    if (target_.per_row && target_.per_column) {
      store_row<T>(code_, element(target_.data, code_, r * n_), n_, g);
    } else if (target_.per_row) {
      static_cast<T*>(target_.data)[r] = static_cast<T>(row.sum(g));
    } else if (target_.per_column) {
      T* sum = columns_ + chunk * n_;
      for (int64_t j = 0; j < n_; ++j) sum[j] += g[j];
    } else {
      scalars_[chunk] += row.sum(g);
    }
  }

  void finish() {
    if (shared_columns()) {
      for (int64_t j = 0; j < n_; ++j) {
        double sum = 0.0;
        for (int64_t c = 0; c < chunks_; ++c) sum += static_cast<double>(columns_[c * n_ + j]);
        static_cast<T*>(target_.data)[j] = static_cast<T>(sum);
      }
    }
    if (shared_scalar()) {
      double sum = 0.0;
      for (int64_t c = 0; c < chunks_; ++c) sum += scalars_[c];
      *static_cast<T*>(target_.data) = static_cast<T>(sum);
    }
  }

 private:
  bool shared_columns() const { return wanted() && !target_.per_row && target_.per_column; }
  bool shared_scalar() const { return wanted() && !target_.per_row && !target_.per_column; }

  const GradientTarget target_;
  const int64_t code_;
  const int64_t n_, chunks_;
  Buffer<T> columns_;
  Buffer<double> scalars_;
};

KSSM_FN int64_t checkpoint_steps(int64_t steps) {
  if (steps <= kCheckpointSteps) return steps;
  int64_t length = kCheckpointSteps / 8;
  while (length * length < steps) ++length;
  return length;
}

// Rows whose features' adjoint is taken together: short ones whose last phases are at hand.
template <class T> KSSM_FN int64_t adjoints_together(const KuramotoCall& call, const KuramotoSaved& saved) {
  return saved.grad_features && saved.phases ? rows_together<T>(call.n) : 1;
}

// Everything one chunk of rows needs to run backward.
template <class T> class Adjoint {
 public:
  Adjoint(const KuramotoCall& call, const KuramotoSaved& saved, GradientSum<T>* sums, const Plan& plan, bool& ok)
      : call_(call), saved_(saved), sums_(sums), in_lanes_(plan.together > 1), stride_(padded<T>(call.n)),
        length_(checkpoint_steps(call.steps)), checkpoints_(length_ ? (call.steps + length_ - 1) / length_ : 1),
        row_(call, ok), states_((length_ ? length_ : 1) * stride_, ok),
        marks_(checkpoints_ > 1 ? checkpoints_ * stride_ : 0, ok), end_(call.n, ok), g_(call.n, ok),
        means_(length_, ok),
        totals_(kOperands * stride_, ok), rest_(6 * call.harmonics, ok), weights_(2 * call.harmonics, ok),
        numbers_(kMaxGroupNumbers, ok), ends_(in_lanes_ ? plan.together : 0, call.n, ok),
        pulls_(in_lanes_ ? plan.together : 0, call.n, ok),
        lane_work_(in_lanes_ ? call.harmonics : 0, ok) {}

  void run(int64_t chunk, int64_t first, int64_t last, bool first_of_chunk) {
    if (in_lanes_) pull_in_lanes(first, last);
    for (int64_t r = first; r < last; ++r) run_row(chunk, r, pulls_[r - first], first_of_chunk && r == first);
  }

 private:
  // pull: what the features give to the last phases' gradient, if in_lanes_
  void run_row(int64_t chunk, int64_t r, const T* pull, bool first_of_chunk) {
    row_.set_row(r);
    T* totals[kOperands] = {};
    for (int k = kCoupling; k < kOperands; ++k) {
      if (!sums_[k].wanted()) continue;
      totals[k] = totals_ + k * stride_;
      zero<T>(totals[k], call_.n);
    }
    const bool keep = starts_alike(call_) && !first_of_chunk;
    if (!keep) load_padded(r);
    if (checkpoints_ > 1) mark();
    for (int64_t k = checkpoints_ - 1; k >= 0 && !row_.stopped(); --k) {
      const int64_t first = k * length_, last = first + length_ < call_.steps ? first + length_ : call_.steps;
      if (checkpoints_ > 1) {
        copy(marks_ + k * stride_, states_);
        row_.start(states_, false);
      }
      replay(first, last, keep);
      if (last == call_.steps) gradient_of_end(r, last - first, pull);
      for (int64_t s = last - 1; s >= first; --s) {
        const T* state = states_ + (s - first) * stride_;
        if (s != last - 1) row_.mean_field(state);  // for its cos and sin; the mean is the same
        row_.adjoint(state, means_[s - first], s, g_, totals);
      }
    }
    sums_[kTheta].add(row_, chunk, r, g_);
    for (int k = kCoupling; k < kOperands; ++k) sums_[k].add(row_, chunk, r, totals[k]);
  }

  void copy(const T* from, T* to) {
    for (int64_t j = 0; j < stride_; j += kLanes<T>) store(to + j, load(from + j));
  }

  void load_padded(int64_t r) {
    store(states_ + stride_ - kLanes<T>, Vec<T>{});
    load_theta<T>(call_, r, states_);
    const T* const start = row_.start(states_, true);
    if (start != states_) copy(start, states_);
  }

  // the states at steps 0, length, 2 length, ..
  void mark() {
    copy(states_, marks_);
    for (int64_t s = 0; s < (checkpoints_ - 1) * length_ && !row_.stopped(); ++s) {
      row_.advance(states_, row_.mean_field(states_), s, states_);
      if ((s + 1) % length_ == 0) copy(states_, marks_ + (s + 1) / length_ * stride_);
    }
  }

  // states and mean fields of steps first..last, from the first state; the end too, where nobody saved it
  void replay(int64_t first, int64_t last, bool keep) {
    for (int64_t s = first; s < last; ++s) {
      T* state = states_ + (s - first) * stride_;
      if (!keep) means_[s - first] = row_.mean_field(state);
      if (s + 1 < last) row_.advance(state, means_[s - first], s, state + stride_);
    }
    if (last == call_.steps && last > first && saved_.grad_features && !saved_.phases) {
      const int64_t i = last - 1 - first;
      row_.advance(states_ + i * stride_, means_[i], last - 1, end_);
    }
  }

  void pull_in_lanes(int64_t first, int64_t last) {
    const T* end[kLanes<T>];
    T* pull[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) {
      const int64_t r = first + i;
      pull[i] = pulls_[i];
      end[i] = r < last ? whole_row<T>(call_.code, element(saved_.phases, call_.code, r * call_.n), 1, call_.n, ends_[i])
                        : end[0];
      if (r < last) weigh(r, lane_work_.rows[i]);
    }
    lane_adjoint<T>(end, call_.n, call_.harmonics, lane_work_, pull);
  }

  void weigh(int64_t r, T* weights) {
    const int64_t at = r * 3 * call_.harmonics;
    adjoint_weights<T>(call_.code, element(saved_.features, call_.code, at),
                       element(saved_.grad_features, call_.code, at), call_.n, call_.harmonics, rest_, weights);
  }

  void gradient_of_end(int64_t r, int64_t steps_in_segment, const T* pull) {
    const int64_t n = call_.n;
    zero<T>(g_, n);
    if (saved_.grad_phases) load_row<T>(call_.code, element(saved_.grad_phases, call_.code, r * n), 1, n, g_);
    if (in_lanes_) {
      for (int64_t j = 0; j < stride_; j += kLanes<T>) store(g_ + j, load(g_ + j) + load(pull + j));
    } else if (saved_.grad_features) {
      const T* end = end_;
      if (saved_.phases) load_row<T>(call_.code, element(saved_.phases, call_.code, r * n), 1, n, end_);
      else if (steps_in_segment == 0) end = states_;
      weigh(r, weights_);
      harmonic_adjoint<T>(end, n, call_.harmonics, weights_, numbers_, g_);
    }
    for (int64_t j = n; j < stride_; ++j) g_[j] = T(0);
  }

  const KuramotoCall& call_;
  const KuramotoSaved& saved_;
  GradientSum<T>* const sums_;
  const bool in_lanes_;
  const int64_t stride_, length_, checkpoints_;
  KuramotoRow<T> row_;
  Buffer<T> states_, marks_;
  RowBuffer<T> end_, g_;
  Buffer<Mean<T>> means_;
  Buffer<T> totals_, rest_, weights_, numbers_;
  Rows<T> ends_, pulls_;
  LaneWork<T> lane_work_;
};

template <class T>
bool backward(const KuramotoCall& call, const KuramotoSaved& saved, const GradientTarget* targets) {
  const Plan plan(call, adjoints_together<T>(call, saved));
  bool ok = true;
  // theta's own gradient leaves in theta's dtype if no sum is taken over rows; all else in the compute dtype
  GradientSum<T> sums[kOperands] = {
      {targets[kTheta], targets[kTheta].per_row ? call.code : code_of<T>(), call.n, plan.count, ok},
      {targets[kCoupling], code_of<T>(), call.n, plan.count, ok},
      {targets[kOmega], code_of<T>(), call.n, plan.count, ok},
      {targets[kPhaseLag], code_of<T>(), call.n, plan.count, ok},
      {targets[kNoiseScale], code_of<T>(), call.n, plan.count, ok},
  };
  if (failed(ok)) return false;
  parallel_for(plan.count, plan.threads, [&](int64_t chunk) {
    Adjoint<T> adjoint(call, saved, sums, plan, ok);
    for (int64_t r = plan.first(chunk); r < plan.last(chunk) && !failed(ok); r += plan.together)
      adjoint.run(chunk, r, plan.end_of(r + plan.together), r == plan.first(chunk));
  }, call.watch);
  if (ok)
    for (auto& sum : sums) sum.finish();
  return ok;
}

}  // namespace

namespace {

template <class T> bool forward_any(const KuramotoCall& call, void* features, void* phases) {
  return call.n > kRowBlock ? forward_long<T>(call, worth_threads(work(call), call.threads), features, phases)
                         : forward<T>(call, features, phases);
}

template <class T>
bool backward_any(const KuramotoCall& call, const KuramotoSaved& saved, const GradientTarget* targets) {
  return call.n > kRowBlock ? backward_long<T>(call, worth_threads(work(call), call.threads), saved, targets)
                         : backward<T>(call, saved, targets);
}

template <class Call> KuramotoCall read(const Call& call, int threads, Watch* watch) {
  KuramotoCall found(call, threads, watch);
  found.watch = watched(watch, work(found));
  return found;
}

}  // namespace

bool kuramoto_forward(const KuramotoForward& packed, int threads, Watch* watch) {
  const KuramotoCall call = read(packed, threads, watch);
  void *const features = pointer(packed.features), *const phases = pointer(packed.phases);
  return call.code == kFloat64 ? forward_any<double>(call, features, phases) : forward_any<float>(call, features, phases);
}

bool kuramoto_backward(const KuramotoBackward& packed, int threads, Watch* watch) {
  const KuramotoCall call = read(packed, threads, watch);
  const KuramotoSaved saved = {pointer(packed.features), pointer(packed.phases), pointer(packed.g_features),
                               pointer(packed.g_phases)};
  GradientTarget targets[kOperands];
  for (int k = 0; k < kOperands; ++k)
    targets[k] = {pointer(packed.targets[k].data), packed.targets[k].per_row != 0, packed.targets[k].per_column != 0};
  return call.code == kFloat64 ? backward_any<double>(call, saved, targets) : backward_any<float>(call, saved, targets);
}

KSSM_NAMESPACE_END
