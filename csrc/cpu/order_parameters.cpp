// Order parameters [C | S | M] of every row of phases, and their adjoint. Equations: kssm_kernels/ops/order_parameters/__init__.py.
//
// Rows of up to kLaneRows oscillators are taken as many at a time as a vector has lanes, and rows of up to kRowBlock one
// at a time: either way shared out among the threads. A longer row is cut into blocks that all threads work on, whose sums
// are added in order, in double.

#include "entry_points.h"
#include "harmonic_sums.h"
#include "parallel.h"

KSSM_NAMESPACE_BEGIN

namespace {

struct PhaseRows {
  const void* data;
  int64_t rows, n, row_stride, column_stride, code;
  Watch* watch;

  template <class Call>
  PhaseRows(const Call& call, Watch* watching)
      : data(pointer(call.theta)), rows(call.rows), n(call.n), row_stride(call.row_stride),
        column_stride(call.column_stride), code(call.code), watch(watching) {}
};

KSSM_FN double work(const PhaseRows& theta, int harmonics) {
  return static_cast<double>(theta.rows) * static_cast<double>(theta.n) * (2 * harmonics + 20) / kLanes<float>;
}

KSSM_FN Watch* watch_of(const PhaseRows& theta, int harmonics) { return watched(theta.watch, work(theta, harmonics)); }

// Phases of one row from begin on, in T: where they lie, or read into scratch.
template <class T>
KSSM_FN const T* phases(const PhaseRows& theta, int64_t row, int64_t begin, int64_t count, T* scratch) {
  const void* source = element(theta.data, theta.code, row * theta.row_stride + begin * theta.column_stride);
  return whole_row<T>(theta.code, source, theta.column_stride, count, scratch);
}

// A lane's width of result rows of `count`, from row `first` on: each in its place, or in scratch and stored from there.
template <class T> class ResultRows {
 public:
  ResultRows(void* data, int64_t code, int64_t count, bool& ok)
      : data_(data), code_(code), count_(count), in_place_(whole_vectors<T>(code, 1, count)), scratch_(kLanes<T>, count, ok) {}

  T* const* start(int64_t first, int64_t last) {
    for (int64_t i = 0; i < kLanes<T>; ++i)
      rows_[i] = in_place_ && first + i < last ? static_cast<T*>(data_) + (first + i) * count_ : scratch_[i];
    return rows_;
  }
  void finish(int64_t first, int64_t last) {
    for (int64_t i = 0; !in_place_ && i < kLanes<T> && first + i < last; ++i)
      store_row<T>(code_, element(data_, code_, (first + i) * count_), count_, rows_[i]);
  }

 private:
  void* const data_;
  const int64_t code_;
  const int64_t count_;
  const bool in_place_;
  Rows<T> scratch_;
  T* rows_[kLanes<T>];
};

// f(first, last) for chunks of rows that begin at multiples of `together`
template <class F> KSSM_FN void for_chunks(const PhaseRows& theta, int harmonics, int64_t together, int threads, const F& f) {
  const Chunks chunks(theta.rows, together);
  parallel_for(
      chunks.count, threads, [&](int64_t chunk) { f(chunks.first(chunk), chunks.last(chunk)); }, watch_of(theta, harmonics));
}

template <class T> bool forward_in_lanes(const PhaseRows& theta, int harmonics, void* features, int threads) {
  constexpr int W = kLanes<T>;
  bool ok = true;
  for_chunks(theta, harmonics, W, threads, [&](int64_t first, int64_t last) {
    Rows<T> in(W, theta.n, ok);
    LaneWork<T> work(harmonics, ok);
    ResultRows<T> out(features, theta.code, 3 * harmonics, ok);
    if (failed(ok)) return;
    for (int64_t r = first; r < last; r += W) {
      const T* row[W];
      for (int64_t i = 0; i < W; ++i) row[i] = r + i < last ? phases<T>(theta, r + i, 0, theta.n, in[i]) : row[0];
      lane_features<T>(row, theta.n, harmonics, work, out.start(r, last));
      out.finish(r, last);
    }
  });
  return ok;
}

template <class T> bool forward(const PhaseRows& theta, int harmonics, void* features, int threads) {
  if (theta.n <= kLaneRows) return forward_in_lanes<T>(theta, harmonics, features, threads);
  const bool long_rows = theta.n > kRowBlock;
  bool ok = true;
  for_chunks(theta, harmonics, long_rows ? theta.rows : 1, threads, [&](int64_t first, int64_t last) {
    RowBuffer<T> short_row(long_rows ? 1 : theta.n, ok);
    FeatureWork<T> work(harmonics, ok);
    for (int64_t r = first; r < last && !failed(ok); ++r) {
      const auto stretch = [&](int64_t begin, int64_t count, T* scratch) {
        return phases<T>(theta, r, begin, count, scratch ? scratch : static_cast<T*>(short_row));
      };
      row_features<T>(theta.n, harmonics, long_rows ? threads : 1, stretch, work, theta.code,
                      element(features, theta.code, r * 3 * harmonics), ok, watch_of(theta, harmonics));
    }
  });
  return ok;
}

template <class T>
bool backward_in_lanes(const PhaseRows& theta, int harmonics, const void* features, const void* gradient,
                       void* grad_theta, int threads) {
  constexpr int W = kLanes<T>;
  bool ok = true;
  for_chunks(theta, harmonics, W, threads, [&](int64_t first, int64_t last) {
    Rows<T> in(W, theta.n, ok);
    LaneWork<T> work(harmonics, ok);
    ResultRows<T> out(grad_theta, theta.code, theta.n, ok);
    Buffer<T> rest(6 * harmonics, ok);
    if (failed(ok)) return;
    for (int64_t r = first; r < last; r += W) {
      const T* row[W];
      for (int64_t i = 0; i < W; ++i) {
        row[i] = r + i < last ? phases<T>(theta, r + i, 0, theta.n, in[i]) : row[0];
        if (r + i >= last) continue;
        const int64_t at = (r + i) * 3 * harmonics;
        adjoint_weights<T>(theta.code, element(features, theta.code, at), element(gradient, theta.code, at), theta.n,
                           harmonics, rest, work.rows[i]);
      }
      lane_adjoint<T>(row, theta.n, harmonics, work, out.start(r, last));
      out.finish(r, last);
    }
  });
  return ok;
}

template <class T>
bool backward(const PhaseRows& theta, int harmonics, const void* features, const void* gradient, void* grad_theta,
              int threads) {
  if (theta.n <= kLaneRows) return backward_in_lanes<T>(theta, harmonics, features, gradient, grad_theta, threads);
  const int64_t blocks = (theta.n + kRowBlock - 1) / kRowBlock;
  const int64_t chunks = theta.rows < kMaxChunks ? theta.rows : kMaxChunks;
  const int64_t longest = theta.n < kRowBlock ? theta.n : kRowBlock;
  bool ok = true;
  // a task is a chunk of rows, or one block of one row
  parallel_for(blocks == 1 ? chunks : theta.rows * blocks, threads, [&](int64_t task) {
    RowBuffer<T> scratch(longest, ok), g(longest, ok);
    Buffer<T> numbers(kMaxGroupNumbers, ok), weights(2 * harmonics, ok), rest(6 * harmonics, ok);
    if (failed(ok)) return;
    const int64_t first = blocks == 1 ? task * theta.rows / chunks : task / blocks;
    const int64_t last = blocks == 1 ? (task + 1) * theta.rows / chunks : first + 1;
    const int64_t begin = blocks == 1 ? 0 : task % blocks * kRowBlock;
    const int64_t count = theta.n - begin < longest ? theta.n - begin : longest;
    for (int64_t r = first; r < last; ++r) {
      adjoint_weights<T>(theta.code, element(features, theta.code, r * 3 * harmonics),
                         element(gradient, theta.code, r * 3 * harmonics), theta.n, harmonics, rest, weights);
      zero<T>(g, count);
      harmonic_adjoint<T>(phases<T>(theta, r, begin, count, scratch), count, harmonics, weights, numbers, g);
      store_row<T>(theta.code, element(grad_theta, theta.code, r * theta.n + begin), count, g);
    }
  }, watch_of(theta, harmonics));
  return ok;
}

}  // namespace

bool order_parameters_forward(const OrderParametersForward& call, int threads, Watch* watch) {
  const PhaseRows theta(call, watch);
  const int harmonics = static_cast<int>(call.harmonics);
  void* const features = pointer(call.features);
  threads = worth_threads(work(theta, harmonics), threads);
  return theta.code == kFloat64 ? forward<double>(theta, harmonics, features, threads)
                                : forward<float>(theta, harmonics, features, threads);
}

bool order_parameters_backward(const OrderParametersBackward& call, int threads, Watch* watch) {
  const PhaseRows theta(call, watch);
  const int harmonics = static_cast<int>(call.harmonics);
  const void *const features = pointer(call.features), *const gradient = pointer(call.g_features);
  void* const grad_theta = pointer(call.g_theta);
  threads = worth_threads(work(theta, harmonics), threads);
  return theta.code == kFloat64 ? backward<double>(theta, harmonics, features, gradient, grad_theta, threads)
                                : backward<float>(theta, harmonics, features, gradient, grad_theta, threads);
}

KSSM_NAMESPACE_END
