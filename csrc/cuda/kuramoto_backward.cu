// The adjoint of all steps of rows that one team holds in registers: the steps once more, keeping states, and back.
// Equations: kssm_kernels/ops/kuramoto/__init__.py.

#include "harmonic_team.h"
#include "kuramoto.h"

KSSM_NAMESPACE_BEGIN

namespace {

// A sum over rows is over a run of them, in order: its first row writes, the others add.
template <class T> struct Place {
  int64_t row, part;
  bool active, in_grid, first, accumulate;  // in_grid: the team has a run at all

  template <class S, int V>
  KSSM_DEVICE void put(const Target& target, int64_t n, const Items<V>& items, const T (&x)[kItems]) const {
    if (!in_grid || (target.per_row && !active)) return;
    S* const p = reinterpret_cast<S*>(target.data) + (target.per_row ? row : part) * n;
    const Items<V> whole{static_cast<int>(n), items.lanes, items.rank};
    T sum[kItems];
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) sum[k] = x[k];
    if (adds(target)) {
      T before[kItems];
      whole.load_from(p, 1, before);
      KSSM_UNROLL
      for (int k = 0; k < kItems; ++k) sum[k] += before[k];
    }
    whole.store_to(p, sum);
  }
  KSSM_DEVICE void put_sum(const Target& target, T sum) const {
    if (!in_grid || (target.per_row && !active)) return;
    T* const p = reinterpret_cast<T*>(target.data) + (target.per_row ? row : part);
    store(p, adds(target) ? load(p) + sum : sum);
  }
  KSSM_DEVICE bool adds(const Target& target) const { return accumulate || !(target.per_row || first); }
};

template <class T, int V>
KSSM_DEVICE void put_total(const Team& team, const Target& target, const Place<T>& to, int64_t n, const Items<V>& items,
                           const T (&total)[kItems], T* warps, int& turn) {
  if (!target.data) return;
  if (target.per_column) return to.template put<T>(target, n, items, total);
  T sum[1] = {T(0)};
  KSSM_UNROLL
  for (int k = 0; k < kItems; ++k) sum[0] += total[k];
  team_sum(team, sum, warps, turn);
  if (team.rank == 0) to.put_sum(target, sum[0]);
}

template <class S, int PARTS>
__global__ void __launch_bounds__(sizeof(S) == 8 ? kRegisters255 : kRegisters168, 1)
    backward(KuramotoFusedBackward call, int lanes, int64_t bytes) {
  using T = Compute<S>;
  constexpr int V = kVector<S>;
  KSSM_SHARED(shared);
  const Team team(lanes);
  T* const warps = reinterpret_cast<T*>(shared + team.index * bytes);
  T* const numbers = reinterpret_cast<T*>(shared + team.index * bytes + team_sum_bytes<T>(lanes));
  const int64_t n = call.update.n, rows = call.update.rows, run = (rows + call.parts - 1) / call.parts;
  const int harmonics = static_cast<int>(call.harmonics);
  const T count = static_cast<T>(n);
  int turn = 0;
  for (int64_t i = 0; i < run; ++i) {
    const int64_t part = team.number(), r = part * run + i;
    const bool active = part < call.parts && r < rows;
    const Row<T, V> row(call.update, r, 0, Items<V>{active ? static_cast<int>(n) : 0, lanes, team.rank});
    const S* const start =
        reinterpret_cast<const S*>(call.start.theta) + (active ? r * call.start.row_stride : 0);
    T* const states = reinterpret_cast<T*>(call.states) + (active ? r * n : 0);
    T x[kItems], c[kItems], s[kItems], g[kItems];

    row.items.load_from(start, call.start.column_stride, x);
    const int64_t replayed = call.end.features ? call.steps : call.steps - 1;  // phases after the last: for features
    const auto keep = [&](int64_t step, const T(&after)[kItems]) {
      if (step + 1 < call.steps) row.items.store_to(states + step * rows * n, after);
    };
    take_steps<PARTS>(team, row, n, call.first, replayed, call.keeping == kWrapping, x, warps, turn, keep);

    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) g[k] = T(0);
    const int64_t first_of_row = active ? r * n : 0;
    if (call.g && call.g_code == kCode<S>) {
      row.items.load_from(reinterpret_cast<const S*>(call.g) + first_of_row, 1, g);
    } else if (call.g && call.g_code == kCode<T>) {
      row.items.load_from(reinterpret_cast<const T*>(call.g) + first_of_row, 1, g);
    } else if (call.g) {
      KSSM_UNROLL
      for (int k = 0; k < kItems; ++k)
        if (row.items.live(k)) g[k] = load_coded<T>(call.g_code, call.g, r * n + row.items.position(k));
    }
    if (call.end.features) {
      // a team without a row reads the first one's
      read_numbers(team, call.end, active ? r : 0, n, harmonics, numbers);
      add_adjoint(x, harmonics, numbers, g);
      KSSM_UNROLL
      for (int k = 0; k < kItems; ++k) g[k] = row.items.live(k) ? g[k] : T(0);
    }

    Totals<T> totals;
    totals.clear();
    for (int64_t step = call.steps - 1; step >= 0; --step) {
      if (step == 0) row.items.load_from(start, call.start.column_stride, x);
      else row.items.load_from(static_cast<const T*>(states + (step - 1) * rows * n), 1, x);
      T ca[kItems], sa[kItems];
      row.unit_vectors(x, c, s);
      row.shifted(x, c, s, ca, sa);
      const Mean<T> to_mean = row.mean_gradient(g, ca, sa);
      T sums[4] = {T(0), T(0), to_mean.cos, to_mean.sin};
      KSSM_UNROLL
      for (int k = 0; k < kItems; ++k) {
        sums[0] += c[k];
        sums[1] += s[k];
      }
      team_sum(team, sums, warps, turn);
      row.adjoint(c, s, ca, sa, Mean<T>{sums[0] / count, sums[1] / count}, Mean<T>{sums[2] / count, sums[3] / count},
                  call.first + step, call.targets + 1, g, totals);
    }

    const Place<T> to{r, part, active, part < call.parts, i == 0, call.accumulate != 0};
    put_total(team, call.targets[1], to, n, row.items, totals.coupling, warps, turn);
    put_total(team, call.targets[2], to, n, row.items, totals.omega, warps, turn);
    put_total(team, call.targets[3], to, n, row.items, totals.phase_lag, warps, turn);
    put_total(team, call.targets[4], to, n, row.items, totals.noise_scale, warps, turn);
    if (!call.targets[0].data) continue;
    const Place<T> to_start{r, part, active, part < call.parts, i == 0, false};
    if (call.targets[0].per_row) to_start.template put<S>(call.targets[0], n, row.items, g);
    else to_start.template put<T>(call.targets[0], n, row.items, g);
  }
}

struct Run {
  const KuramotoFusedBackward& call;
  void* stream;
  template <class S> int run() const {
    using T = Compute<S>;
    const int lanes = fused_lanes(call.update.n);
    if (!lanes || call.parts < 1) return kWrongCall;
    const int64_t bytes = team_sum_bytes<T>(lanes) + (call.end.features ? adjoint_bytes<T>(call.harmonics) : 0);
    const Shape shape(lanes, call.parts, bytes);
    const auto kernel = call.keeping == kWhole ? backward<S, 1> : backward<S, 2>;
    return launch(kernel, shape.blocks, shape.threads, shape.shared, stream, call, lanes, bytes);
  }
};

}  // namespace

int kuramoto_backward(const KuramotoFusedBackward& call, void* stream) {
  return with_storage(call.start.code, Run{call, stream});
}

KSSM_NAMESPACE_END
