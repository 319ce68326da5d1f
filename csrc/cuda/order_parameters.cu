// Order parameters of rows of phases, and their adjoint. Equations: kssm_kernels/ops/order_parameters/__init__.py.
// A forward unit of work is a block of a row; rows of several blocks leave partial sums, which are added in order.

#include "harmonic_team.h"
#include "row_blocks.h"

KSSM_NAMESPACE_BEGIN

namespace {

template <class S> KSSM_DEVICE const S* row_of(int64_t theta, int64_t row, int64_t row_stride) {
  return reinterpret_cast<const S*>(theta) + row * row_stride;
}

// The thread's vectors of phases of one row block, or one row: element (round * lanes + rank) * V + v.
template <class S> struct Phases {
  const S* first;
  int64_t stride;
  int count, lanes, rank;

  KSSM_DEVICE int at(int round) const { return (round * lanes + rank) * kVector<S>; }
  KSSM_DEVICE unsigned operator()(int round, Compute<S> (&theta)[kVector<S>]) const {
    const int j = at(round), left = count - j;
    load_run(first + j * stride, stride, left, theta);
    return left >= kVector<S> ? 0xffu : left > 0 ? (1u << left) - 1 : 0u;
  }
};

template <class S>
__global__ void __launch_bounds__(sizeof(S) == 4 ? kRegisters128 : sizeof(S) == 2 ? kRegisters168 : kRegisters255, 1)
    forward(OrderParametersForward call, int lanes, int64_t bytes) {
  using T = Compute<S>;
  KSSM_SHARED(shared);
  const Team team(lanes);
  T* const sums = reinterpret_cast<T*>(shared + team.index * bytes);
  T* const row = reinterpret_cast<T*>(shared + team.index * bytes + whole_vectors(sums_bytes<T>(lanes)));
  const int harmonics = static_cast<int>(call.harmonics);
  const int64_t row_blocks = (call.n + call.row_block - 1) / call.row_block;
  const int64_t r = team.number() / row_blocks, begin = team.number() % row_blocks * call.row_block;
  const bool active = r < call.rows;
  const int64_t left = call.n - begin, count = left < call.row_block ? left : call.row_block;
  const Phases<S> phases{active ? row_of<S>(call.theta, r, call.row_stride) + begin * call.column_stride : nullptr,
                         call.column_stride, active ? static_cast<int>(count) : 0, lanes, team.rank};
  const int longest = static_cast<int>(call.n < call.row_block ? call.n : call.row_block);
  const int per_round = lanes * kVector<S>;
  harmonic_sums<T, kVector<S>>(team, harmonics, (longest + per_round - 1) / per_round, phases, sums, row);
  if (row_blocks > 1) {
    T* const partial = reinterpret_cast<T*>(call.workspace) + team.number() * 2 * harmonics;
    if (active) write_row<T>(team, row, 2 * harmonics, partial);
    return;
  }
  finish_features(team, call.n, harmonics, row);
  if (active) write_row<S>(team, row, 3 * harmonics, reinterpret_cast<S*>(call.features) + r * 3 * harmonics);
}

template <class S>
__global__ void __launch_bounds__(sizeof(S) == 8 ? kRegisters255 : kRegisters128, 1)
    backward(OrderParametersBackward call, int lanes, int64_t bytes) {
  using T = Compute<S>;
  constexpr int V = kVector<S>;
  KSSM_SHARED(shared);
  const Team team(lanes);
  T* const numbers = reinterpret_cast<T*>(shared + team.index * bytes);
  const int harmonics = static_cast<int>(call.harmonics);
  const int64_t row_blocks = (call.n + kRowBlock - 1) / kRowBlock;
  const int64_t r = team.number() / row_blocks, begin = team.number() % row_blocks * kRowBlock;
  const bool active = r < call.rows;
  // a team without a row reads the first one's
  read_numbers(team, SavedFeatures{call.features, call.g_features, call.code}, active ? r : 0, call.n, harmonics, numbers);
  if (!active) return;
  const int64_t left = call.n - begin;
  const int count = static_cast<int>(left < kRowBlock ? left : kRowBlock);
  const Phases<S> phases{row_of<S>(call.theta, r, call.row_stride) + begin * call.column_stride, call.column_stride,
                         count, lanes, team.rank};
  S* const out = reinterpret_cast<S*>(call.g_theta) + r * call.n + begin;
  for (int i = 0; phases.at(i) < count; ++i) {
    T theta[V], g[V];
    phases(i, theta);
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) g[v] = T(0);
    add_adjoint(theta, harmonics, numbers, g);
    store_run(out + phases.at(i), count - phases.at(i), g);
  }
}

constexpr int64_t kLongestRowBlock = int64_t{1} << 30;  // counted in int, which takes half the registers

// 16 elements or so for each thread: the sum over a team costs as much as ten of them. Up to four warps for long rows.
int team_lanes(int64_t n) {
  if (forced_lanes) return forced_lanes;
  return n <= 1024 ? lanes_for(n, 12, kWarp) : static_cast<int>(kThreads);
}

struct RunForward {
  const OrderParametersForward& call;
  void* stream;
  template <class S> int run() const {
    using T = Compute<S>;
    const int64_t longest = call.n < call.row_block ? call.n : call.row_block;
    if (longest < 1 || longest > kLongestRowBlock) return kWrongCall;
    const int64_t row_blocks = (call.n + call.row_block - 1) / call.row_block;
    const int lanes = team_lanes(longest);
    const int64_t bytes = features_bytes<T>(lanes, call.harmonics);
    const Shape shape(lanes, call.rows * row_blocks, bytes);
    const int error = launch(forward<S>, shape.blocks, shape.threads, shape.shared, stream, call, lanes, bytes);
    if (error || row_blocks == 1) return error;
    return sum_features<S>(call.workspace, call.rows, row_blocks, call.n, call.harmonics, call.features, stream);
  }
};

struct RunBackward {
  const OrderParametersBackward& call;
  void* stream;
  template <class S> int run() const {
    using T = Compute<S>;
    const int64_t row_blocks = (call.n + kRowBlock - 1) / kRowBlock;
    const int lanes = team_lanes(call.n < kRowBlock ? call.n : kRowBlock);
    const int64_t bytes = adjoint_bytes<T>(call.harmonics);
    const Shape shape(lanes, call.rows * row_blocks, bytes);
    return launch(backward<S>, shape.blocks, shape.threads, shape.shared, stream, call, lanes, bytes);
  }
};

}  // namespace

int order_parameters_forward(const OrderParametersForward& call, void* stream) {
  return with_storage(call.code, RunForward{call, stream});
}

int order_parameters_backward(const OrderParametersBackward& call, void* stream) {
  return with_storage(call.code, RunBackward{call, stream});
}

KSSM_NAMESPACE_END
