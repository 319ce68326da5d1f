// One step of rows of any length and its adjoint, block by block: their mean field, and the gradient's part that
// goes through it, are sums over row blocks and come from launches before.

#include "kuramoto.h"
#include "row_blocks.h"

KSSM_NAMESPACE_BEGIN

namespace {

static_assert(kRowBlock == kMaxLanes * kItems, "a row_block is a block's");

// The block's row block of a row.
struct RowBlock {
  KSSM_DEVICE explicit RowBlock(int64_t n)
      : count((n + kRowBlock - 1) / kRowBlock), row(blockIdx.x / count), number(blockIdx.x % count), 
        begin(number * kRowBlock), length(n - begin < kRowBlock ? n - begin : kRowBlock), at(row * n + begin) {}
  template <int V> KSSM_DEVICE Items<V> items() const {
    return {static_cast<int>(length), static_cast<int>(blockDim.x), static_cast<int>(threadIdx.x)};
  }
  int64_t count, row, number, begin, length, at;
};

template <class T> KSSM_DEVICE Mean<T> mean_at(int64_t z, int64_t row, int width) {
  const T* const p = reinterpret_cast<const T*>(z) + row * width;
  return {load(p), load(p + 1)};
}

// PARTS as in take_steps: with both in one kernel 86 registers, not 72, left room for two blocks, not three.
template <class T, int PARTS> __global__ void __launch_bounds__(kMaxLanes, 1) step(KuramotoStep call) {
  constexpr int V = kVector<T>;
  const RowBlock row_block(call.update.n);
  const Row<T, V> row(call.update, row_block.row, row_block.begin, row_block.items<V>());
  T x[kItems], c[kItems], s[kItems];
  row.items.load_from(reinterpret_cast<const T*>(call.state) + row_block.at, 1, x);
  row.unit_vectors(x, c, s);
  const Mean<T> z = mean_at<T>(call.z, row_block.row, 3);
  if constexpr (PARTS == 1) {
    row.advance(x, c, s, z, call.step, x);
  } else {  // folded at every step: the state alone is then the rounded phase, which the mean field is of
    T* const kept = reinterpret_cast<T*>(call.moved) + row_block.at;
    T moved[kItems];
    row.items.load_from(static_cast<const T*>(kept), 1, moved);
    row.advance(x, c, s, z, call.step, moved);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) fold(x[k], moved[k], call.keeping == kWrapping);
    row.items.store_to(kept, moved);
  }
  row.items.store_to(reinterpret_cast<T*>(call.out) + row_block.at, x);
}

template <class T> __global__ void __launch_bounds__(kMaxLanes, 1) adjoint_sums(KuramotoAdjointSums call) {
  constexpr int V = kVector<T>;
  KSSM_SHARED(shared);
  const Team team(static_cast<int>(blockDim.x));
  const RowBlock row_block(call.update.n);
  const Row<T, V> row(call.update, row_block.row, row_block.begin, row_block.items<V>());
  T x[kItems], g[kItems], c[kItems], s[kItems], ca[kItems], sa[kItems];
  row.items.load_from(reinterpret_cast<const T*>(call.state) + row_block.at, 1, x);
  row.items.load_from(reinterpret_cast<const T*>(call.g) + row_block.at, 1, g);
  row.unit_vectors(x, c, s);
  row.shifted(x, c, s, ca, sa);
  const Mean<T> sum = row.mean_gradient(g, ca, sa);
  T sums[2] = {sum.cos, sum.sin};
  int turn = 0;
  team_sum(team, sums, reinterpret_cast<T*>(shared), turn);
  T* const out = reinterpret_cast<T*>(call.workspace) + (row_block.row * row_block.count + row_block.number) * 2;
  if (team.rank < 2) store(out + team.rank, team.rank ? sums[1] : sums[0]);
}

template <class T, int V>
KSSM_DEVICE void gain(const Target& target, const Team& team, const RowBlock& row_block, const Items<V>& items,
                      const T (&total)[kItems], T* warps, int& turn) {
  if (!target.data) return;
  T* const p = reinterpret_cast<T*>(target.data);
  if (target.per_column) {
    T sum[kItems];
    items.load_from(static_cast<const T*>(p + row_block.at), 1, sum);
    KSSM_UNROLL
    for (int k = 0; k < kItems; ++k) sum[k] += total[k];
    items.store_to(p + row_block.at, sum);
    return;
  }
  T sum[1] = {T(0)};
  KSSM_UNROLL
  for (int k = 0; k < kItems; ++k) sum[0] += total[k];
  team_sum(team, sum, warps, turn);
  T* const own = p + row_block.row * row_block.count + row_block.number;
  if (team.rank == 0) store(own, load(own) + sum[0]);
}

template <class T> __global__ void __launch_bounds__(kMaxLanes, 1) adjoint_step(KuramotoAdjointStep call) {
  constexpr int V = kVector<T>;
  KSSM_SHARED(shared);
  T* const warps = reinterpret_cast<T*>(shared);
  const Team team(static_cast<int>(blockDim.x));
  const RowBlock row_block(call.update.n);
  const Row<T, V> row(call.update, row_block.row, row_block.begin, row_block.items<V>());
  T x[kItems], g[kItems], c[kItems], s[kItems], ca[kItems], sa[kItems];
  row.items.load_from(reinterpret_cast<const T*>(call.state) + row_block.at, 1, x);
  row.items.load_from(reinterpret_cast<const T*>(call.g) + row_block.at, 1, g);
  row.unit_vectors(x, c, s);
  row.shifted(x, c, s, ca, sa);
  Totals<T> totals;
  totals.clear();
  row.adjoint(c, s, ca, sa, mean_at<T>(call.z, row_block.row, 3), mean_at<T>(call.gz, row_block.row, 2), call.step,
              call.targets, g, totals);
  row.items.store_to(reinterpret_cast<T*>(call.g) + row_block.at, g);
  int turn = 0;
  gain(call.targets[0], team, row_block, row.items, totals.coupling, warps, turn);
  gain(call.targets[1], team, row_block, row.items, totals.omega, warps, turn);
  gain(call.targets[2], team, row_block, row.items, totals.phase_lag, warps, turn);
  gain(call.targets[3], team, row_block, row.items, totals.noise_scale, warps, turn);
}

int64_t row_blocks_of(const KuramotoUpdate& update) { return (update.n + kRowBlock - 1) / kRowBlock; }

template <class T, class Call> int launch_row_blocks(void (*kernel)(Call), const Call& call, void* stream) {
  const int64_t blocks = call.update.rows * row_blocks_of(call.update);
  return launch(kernel, blocks, kMaxLanes, team_sum_bytes<T>(kMaxLanes), stream, call);
}

template <class T> int launch_step(const KuramotoStep& call, void* stream) {
  return launch_row_blocks<T>(call.keeping == kWhole ? step<T, 1> : step<T, 2>, call, stream);
}

template <class T> int launch_sums(const KuramotoAdjointSums& call, void* stream) {
  const int error = launch_row_blocks<T>(adjoint_sums<T>, call, stream);
  if (error) return error;
  const int64_t rows = call.update.rows, n = call.update.n;
  return sum_rows<T>(call.workspace, rows, row_blocks_of(call.update), n, 1, call.sums, Ending::kMean, stream);
}

}  // namespace

int kuramoto_step(const KuramotoStep& call, void* stream) {
  return call.code == kFloat64 ? launch_step<double>(call, stream) : launch_step<float>(call, stream);
}

int kuramoto_adjoint_sums(const KuramotoAdjointSums& call, void* stream) {
  return call.code == kFloat64 ? launch_sums<double>(call, stream) : launch_sums<float>(call, stream);
}

int kuramoto_adjoint_step(const KuramotoAdjointStep& call, void* stream) {
  return call.code == kFloat64 ? launch_row_blocks<double>(adjoint_step<double>, call, stream)
                               : launch_row_blocks<float>(adjoint_step<float>, call, stream);
}

KSSM_NAMESPACE_END
