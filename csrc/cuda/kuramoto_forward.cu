// All steps of rows that one team holds in registers, and the order parameters of the last phases.

#include "harmonic_team.h"
#include "kuramoto.h"

KSSM_NAMESPACE_BEGIN

namespace {

template <class S, int PARTS>
__global__ void __launch_bounds__(sizeof(S) == 8 ? kRegisters255 : PARTS == 2 ? kRegisters168 : kRegisters128, 1)
    forward(KuramotoFusedForward call, int lanes, int64_t bytes) {
  using T = Compute<S>;
  constexpr int V = kVector<S>;
  KSSM_SHARED(shared);
  const Team team(lanes);
  T* const warps = reinterpret_cast<T*>(shared + team.index * bytes);
  const int64_t r = team.number(), n = call.update.n;
  const bool active = r < call.update.rows;
  const Row<T, V> row(call.update, r, 0, Items<V>{active ? static_cast<int>(n) : 0, lanes, team.rank});
  T x[kItems];
  row.items.load_from(reinterpret_cast<const S*>(call.start.theta) + (active ? r * call.start.row_stride : 0),
                      call.start.column_stride, x);
  int turn = 0;
  take_steps<PARTS>(team, row, n, call.first, call.steps, call.keeping == kWrapping, x, warps, turn,
                    [](int64_t, const T(&)[kItems]) {});
  if (call.phases && active) {
    if (call.phases_code == kCode<S>) row.items.store_to(reinterpret_cast<S*>(call.phases) + r * n, x);
    else row.items.store_to(reinterpret_cast<T*>(call.phases) + r * n, x);
  }
  if (!call.features) return;
  const int harmonics = static_cast<int>(call.harmonics);
  unsigned char* const area = shared + team.index * bytes + team_sum_bytes<T>(lanes);
  T* const features = reinterpret_cast<T*>(area + whole_vectors(sums_bytes<T>(lanes)));
  const unsigned live = row.items.live_bits();
  const auto phases = [&](int, T(&theta)[kItems]) {
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) theta[k] = x[k];
    return live;
  };
  harmonic_sums<T, kItems>(team, harmonics, 1, phases, reinterpret_cast<T*>(area), features);
  finish_features(team, n, harmonics, features);
  if (active) write_row<S>(team, features, 3 * harmonics, reinterpret_cast<S*>(call.features) + r * 3 * harmonics);
}

struct Run {
  const KuramotoFusedForward& call;
  void* stream;
  template <class S> int run() const {
    using T = Compute<S>;
    const int lanes = fused_lanes(call.update.n);
    if (!lanes) return kWrongCall;
    const int64_t bytes = team_sum_bytes<T>(lanes) + (call.features ? features_bytes<T>(lanes, call.harmonics) : 0);
    const Shape shape(lanes, call.update.rows, bytes);
    const auto kernel = call.keeping == kWhole ? forward<S, 1> : forward<S, 2>;
    return launch(kernel, shape.blocks, shape.threads, shape.shared, stream, call, lanes, bytes);
  }
};

}  // namespace

int kuramoto_forward(const KuramotoFusedForward& call, void* stream) {
  return with_storage(call.start.code, Run{call, stream});
}

KSSM_NAMESPACE_END
