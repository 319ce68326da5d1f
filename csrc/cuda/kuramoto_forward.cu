// All steps of rows that one team holds in registers, and the order parameters of the last phases.

#include "harmonic_team.h"
#include "kuramoto.h"

KSSM_NAMESPACE_BEGIN

namespace {

struct Forward {
  Update update;
  int64_t start, start_row_stride, start_column_stride, code;  // code: of the start, and of the features
  int64_t first, steps, harmonics, features, phases, phases_code;
};

template <class S, int PARTS>
__global__ void __launch_bounds__(sizeof(S) == 8 ? kRegisters255 : PARTS == 2 ? kRegisters168 : kRegisters128, 1)
    forward(Forward call, int lanes, int64_t bytes) {
  using T = Compute<S>;
  constexpr int V = kVector<S>;
  KSSM_SHARED(shared);
  const Team team(lanes);
  T* const warps = reinterpret_cast<T*>(shared + team.index * bytes);
  const int64_t r = team.number(), n = call.update.n;
  const bool active = r < call.update.rows;
  const Row<T, V> row(call.update, r, 0, Items<V>{active ? static_cast<int>(n) : 0, lanes, team.rank});
  T x[kItems];
  row.items.load_from(reinterpret_cast<const S*>(call.start) + (active ? r * call.start_row_stride : 0),
                      call.start_column_stride, x);
  int turn = 0;
  take_steps<PARTS>(team, row, n, call.first, call.steps, call.update.keeping == kWrapping, x, warps, turn,
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
  const Forward& call;
  void* stream;
  template <class S> int run() const {
    using T = Compute<S>;
    const int lanes = fused_lanes(call.update.n);
    if (!lanes) return kWrongCall;
    const int64_t bytes = team_sum_bytes<T>(lanes) + (call.features ? features_bytes<T>(lanes, call.harmonics) : 0);
    const Shape shape(lanes, call.update.rows, bytes);
    const auto kernel = call.update.keeping == kWhole ? forward<S, 1> : forward<S, 2>;
    return launch(kernel, shape.blocks, shape.threads, shape.shared, stream, call, lanes, bytes);
  }
};

}  // namespace

KSSM_EXPORT int kssm_cuda_kuramoto_forward(const void* packed, int64_t bytes, int device, void* stream) {
  return with_call<Forward>(packed, bytes, device, [&](const Forward& call) {
    return with_storage(call.code, Run{call, stream});
  });
}

KSSM_NAMESPACE_END
