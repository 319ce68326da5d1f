// The Kuramoto update and its adjoint of rows of more than kRowBlock oscillators, one row after another.

#include "harmonic_sums.h"
#include "kuramoto_long.h"

KSSM_NAMESPACE_BEGIN

template <class T> bool forward_long(const KuramotoCall& call, int threads, void* features, void* phases) {
  const int64_t n = call.n;
  bool ok = true;
  LongRow<T> row(call, threads, ok);
  // the phases are written where they are wanted if the kernel may write whole vectors there
  const bool in_place = phases && whole_vectors<T>(call.code, 1, n);
  RowBuffer<T> own(in_place ? 1 : n, ok), moved(row.keeping().in_two ? n : 1, ok);
  FeatureWork<T> work(call.harmonics, ok);
  if (failed(ok)) return false;
  const OperandRows& theta = call.operands[kTheta];
  for (int64_t r = 0; r < call.rows && ok && !row.stopped(); ++r) {
    row.set_row(r);
    T* const end = in_place ? static_cast<T*>(phases) + r * n : static_cast<T*>(own);
    T* const in_two = row.keeping().in_two ? static_cast<T*>(moved) : nullptr;
    const T* state = row.start(element(theta.data, call.code, r * theta.row_stride), theta.column_stride, end, in_two);
    Mean<T> z = call.steps ? row.mean_field(state) : Mean<T>{};
    for (int64_t s = 0; s < call.steps && !row.stopped(); ++s) {
      const bool folds = row.keeping().folds(s);
      if (s + 1 < call.steps) z = row.template advance<true>(state, in_two, z, s, folds, end, nullptr);
      else row.template advance<false>(state, in_two, z, s, folds, end, nullptr);
      state = end;
    }
    if (call.harmonics)
      row_features<T>(
          n, call.harmonics, threads, [&](int64_t begin, int64_t, T*) { return state + begin; }, work, call.code,
          element(features, call.code, r * 3 * call.harmonics), ok, call.watch);
    if (phases && !(in_place && state == end)) row.for_blocks([&](int64_t begin, int64_t stop) {
      store_row<T>(call.code, element(phases, call.code, r * n + begin), stop - begin, state + begin);
    });
  }
  return ok;
}

namespace {

// Trajectories of up to this size and kCheckpointSteps steps are kept whole: the last-level cache has room for them.
constexpr int64_t kKeptBytes = 16 << 20;

// States that a backward pass keeps: every length-th ("mark"), and those between two marks while it walks between them.
// As marks are passed their places are used again: 4 states for 10 steps.
struct Marks {
  Marks(int64_t all_steps, int64_t bytes) : steps(all_steps), length(1) {
    if (steps * bytes <= kKeptBytes && steps <= kCheckpointSteps) length = steps ? steps : 1;
    while (length * length < steps) ++length;
    checkpoints = steps ? (steps + length - 1) / length : 1;
    for (int64_t k = 0; k < checkpoints; ++k)
      if (k + last(k) - first(k) - 1 > slots) slots = k + last(k) - first(k) - 1;
  }
  int64_t first(int64_t checkpoint) const { return checkpoint * length; }
  int64_t last(int64_t checkpoint) const { return first(checkpoint + 1) < steps ? first(checkpoint + 1) : steps; }
  // Slot of the state `i` steps after a mark (i > 0), or of the mark itself; the first state has none.
  static int64_t slot(int64_t checkpoint, int64_t i) { return checkpoint - 1 + i; }

  int64_t steps, length, checkpoints, slots = 0;
};

template <class T> class LongAdjoint {
 public:
  LongAdjoint(const KuramotoCall& call, int threads, const KuramotoSaved& saved, const GradientTarget* targets, bool& ok)
      : call_(call), saved_(saved), targets_(targets), n_(call.n),
        marks_(call.steps, call.n * static_cast<int64_t>(sizeof(T))),
        row_(call, threads, ok), in_two_(row_.keeping().in_two),
        whole_(whole_vectors<T>(code_of<T>(), 1, call.n)), slots_(marks_.slots, call.n, ok),
        first_(starts_in_place() ? 1 : call.n, ok), moved_(in_two_ ? call.n : 1, ok),
        end_(needs_end() ? call.n : 1, ok), g_(g_in_place() ? 1 : call.n, ok),
        theta_sum_(shared_theta() ? call.n : 1, ok),
        own_totals_(own_total_rows(), call.n, ok), means_(call.steps + 1, ok), rest_(6 * call.harmonics, ok),
        weights_(2 * call.harmonics, ok) {}

  void run(bool& ok) {
    if (failed(ok)) return;
    if (shared_theta()) zero_row(theta_sum_);
    for (int64_t r = 0; r < call_.rows && !row_.stopped() && ok; ++r) run_row(r, ok);
    finish_shared();
  }

 private:
  static constexpr int W = kLanes<T>;
  bool wanted(int k) const { return targets_[k].data != nullptr; }
  bool shared_theta() const { return wanted(kTheta) && !targets_[kTheta].per_row; }
  bool g_in_place() const { return wanted(kTheta) && targets_[kTheta].per_row && call_.code == code_of<T>() && whole_; }
  bool starts_in_place() const {
    return !in_two_ && whole_vectors<T>(call_.code, call_.operands[kTheta].column_stride, n_);
  }
  bool needs_end() const { return saved_.grad_features && !(saved_.phases && whole_) && call_.steps; }
  bool in_columns(int k) const { return wanted(k) && targets_[k].per_column; }
  int64_t own_total_rows() const {
    int64_t count = 0;
    for (int k = kCoupling; k < kOperands; ++k) count += in_columns(k) && !whole_;
    return count;
  }

  void zero_row(T* row) {
    row_.for_blocks([&](int64_t begin, int64_t stop) { zero<T>(row + begin, stop - begin); });
  }

  // Arrays and numbers that the row's gradients of the operands add up in.
  typename LongRow<T>::Totals totals_of(int64_t r) {
    typename LongRow<T>::Totals totals{};
    int64_t own = 0;
    for (int k = kCoupling; k < kOperands; ++k) {
      totals.summed[k] = wanted(k) && !targets_[k].per_column;
      if (!in_columns(k)) continue;
      T* const target = static_cast<T*>(targets_[k].data) + (targets_[k].per_row ? r * n_ : 0);
      totals.columns[k] = whole_ ? target : own_totals_[own++];
      if (targets_[k].per_row || r == 0) zero_row(totals.columns[k]);
    }
    row_.clear_scalars();
    return totals;
  }

  void put_totals(int64_t r, const typename LongRow<T>::Totals& totals) {
    for (int k = kCoupling; k < kOperands; ++k) {
      T* const target = static_cast<T*>(targets_[k].data);
      if (totals.summed[k]) {
        const double sum = row_.scalar(k);
        if (targets_[k].per_row) target[r] = static_cast<T>(sum);
        else scalars_[k] += sum;
      } else if (totals.columns[k] && !whole_ && (targets_[k].per_row || r == call_.rows - 1)) {
        T* const to = target + (targets_[k].per_row ? r * n_ : 0);
        for (int64_t j = 0; j < n_; ++j) to[j] = totals.columns[k][j];
      }
    }
  }

  void finish_shared() {
    for (int k = kCoupling; k < kOperands; ++k)
      if (wanted(k) && !targets_[k].per_column && !targets_[k].per_row)
        *static_cast<T*>(targets_[k].data) = static_cast<T>(scalars_[k]);
    if (shared_theta())
      for (int64_t j = 0; j < n_; ++j) static_cast<T*>(targets_[kTheta].data)[j] = theta_sum_[j];
  }

  const T* mark(int64_t checkpoint) const { return checkpoint ? slots_[Marks::slot(checkpoint, 0)] : start_; }

  void run_row(int64_t r, bool& ok) {
    row_.set_row(r);
    const OperandRows& theta = call_.operands[kTheta];
    start_ = row_.start(element(theta.data, call_.code, r * theta.row_stride), theta.column_stride, first_, moved());
    if (call_.steps) means_[0] = row_.mean_field(start_);
    for (int64_t s = 0; s < marks_.first(marks_.checkpoints - 1) && !row_.stopped(); ++s) {
      const int64_t checkpoint = s / marks_.length;
      T* const to = slots_[Marks::slot(checkpoint + 1, 0)];
      const T* const from = s % marks_.length ? to : mark(checkpoint);
      const bool folds = row_.keeping().folds(s) || (s + 1) % marks_.length == 0;
      means_[s + 1] = row_.template advance<true>(from, moved(), means_[s], s, folds, to, nullptr);
    }
    T* const g = g_in_place() ? static_cast<T*>(targets_[kTheta].data) + r * n_ : static_cast<T*>(g_);
    const auto totals = totals_of(r);
    for (int64_t k = marks_.checkpoints - 1; k >= 0 && !row_.stopped() && ok; --k) walk_back(r, k, g, totals);
    put_totals(r, totals);
    if (shared_theta()) {
      row_.for_blocks([&](int64_t begin, int64_t stop) {
        for (int64_t j = begin; j < stop; ++j) theta_sum_[j] += g[j];
      });
    } else if (wanted(kTheta) && !g_in_place()) {
      row_.for_blocks([&](int64_t begin, int64_t stop) {
        store_row<T>(call_.code, element(targets_[kTheta].data, call_.code, r * n_ + begin), stop - begin, g + begin);
      });
    }
  }

  T* moved() { return in_two_ ? static_cast<T*>(moved_) : nullptr; }

  // The states from a checkpoint's mark on, then their adjoints. The mean fields of all but the last are known.
  void walk_back(int64_t r, int64_t checkpoint, T* g, const typename LongRow<T>::Totals& totals) {
    const int64_t first = marks_.first(checkpoint), last = marks_.last(checkpoint);
    const bool at_end = checkpoint == marks_.checkpoints - 1;
    const T* const from = mark(checkpoint);
    const auto state = [&](int64_t i) { return i ? slots_[Marks::slot(checkpoint, i)] : from; };
    if (in_two_) zero_row(moved_);
    for (int64_t s = first; s + 1 < last; ++s) {
      T* const to = slots_[Marks::slot(checkpoint, s - first + 1)];
      if (at_end) means_[s + 1] = step<true>(from, state(s - first), s, to);
      else step<false>(from, state(s - first), s, to);
    }
    if (at_end) {
      const T* end = start_;
      if (call_.steps && saved_.grad_features && !saved_.phases) {
        step<false>(from, state(last - 1 - first), last - 1, end_);
        end = end_;
      }
      gradient_of_end(r, end, g);
    }
    const T* after = nullptr;
    Mean<T> gradient{};
    for (int64_t s = last - 1; s >= first && !row_.stopped(); --s) {
      gradient = row_.adjoint(state(s - first), means_[s], s, after, gradient, g, totals);
      after = state(s - first);
    }
    if (after) row_.finish(after, gradient, g);
  }

  // One step of a replay: `mark` and what has moved since, or the state before it, to an array of phases.
  template <bool NEXT> Mean<T> step(const T* mark, const T* state, int64_t s, T* to) {
    return in_two_ ? row_.template advance<NEXT>(mark, moved(), means_[s], s, false, nullptr, to)
                   : row_.template advance<NEXT>(state, nullptr, means_[s], s, false, to, nullptr);
  }

  void gradient_of_end(int64_t r, const T* end, T* g) {
    if (saved_.grad_phases) row_.for_blocks([&](int64_t begin, int64_t stop) {
      load_row<T>(call_.code, element(saved_.grad_phases, call_.code, r * n_ + begin), 1, stop - begin, g + begin);
      for (int64_t j = stop; j < begin + padded<T>(stop - begin); ++j) g[j] = T(0);
    });
    else zero_row(g);
    if (!saved_.grad_features) return;
    if (saved_.phases && call_.steps) {
      const T* const phases = static_cast<const T*>(saved_.phases) + r * n_;  // of the compute dtype
      if (!whole_) row_.for_blocks([&](int64_t begin, int64_t stop) {
        for (int64_t j = begin; j < stop; ++j) end_[j] = phases[j];
      });
      end = whole_ ? phases : static_cast<const T*>(end_);
    }
    const int64_t at = r * 3 * call_.harmonics;
    adjoint_weights<T>(call_.code, element(saved_.features, call_.code, at),
                       element(saved_.grad_features, call_.code, at), n_, call_.harmonics, rest_, weights_);
    row_.for_blocks([&](int64_t begin, int64_t stop) {
      alignas(64) T numbers[kMaxGroupNumbers];
      harmonic_adjoint<T>(end + begin, stop - begin, call_.harmonics, weights_, numbers, g + begin);
    });
    for (int64_t j = n_; j < padded<T>(n_) && !whole_; ++j) g[j] = T(0);
  }

  const KuramotoCall& call_;
  const KuramotoSaved& saved_;
  const GradientTarget* const targets_;
  const int64_t n_;
  const Marks marks_;
  LongRow<T> row_;
  const bool in_two_, whole_;
  Rows<T> slots_;
  RowBuffer<T> first_, moved_, end_, g_, theta_sum_;
  Rows<T> own_totals_;
  Buffer<Mean<T>> means_;
  Buffer<T> rest_, weights_;
  const T* start_ = nullptr;
  double scalars_[kOperands] = {};
};

}  // namespace

template <class T>
bool backward_long(const KuramotoCall& call, int threads, const KuramotoSaved& saved, const GradientTarget* targets) {
  bool ok = true;
  LongAdjoint<T>(call, threads, saved, targets, ok).run(ok);
  return ok;
}

#define KSSM_INSTANTIATE(T)                                                 \
  template bool forward_long<T>(const KuramotoCall&, int, void*, void*);    \
  template bool backward_long<T>(const KuramotoCall&, int, const KuramotoSaved&, const GradientTarget*);
KSSM_INSTANTIATE(float)
KSSM_INSTANTIATE(double)

KSSM_NAMESPACE_END
