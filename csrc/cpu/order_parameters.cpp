// Order parameters [C | S | M] of every row of phases, and their adjoint. Equations: kssm_kernels/ops/order_parameters.py.
//
// Rows of up to kBlock oscillators are shared out among the threads; a longer row is cut into blocks that all threads
// work on, whose sums are added in order, in double.

#include "entry_points.h"
#include "harmonic_sums.h"
#include "parallel.h"

KSSM_NAMESPACE_BEGIN

namespace {

KSSM_FN double work(const PhaseRows& theta, int harmonics) {
  return static_cast<double>(theta.rows) * static_cast<double>(theta.n) * (2 * harmonics + 20) / kLanes<float>;
}

template <class T> bool forward(const PhaseRows& theta, int harmonics, void* features, int threads) {
  const bool long_rows = theta.n > kBlock;
  const int64_t chunks = long_rows ? 1 : theta.rows < kMaxChunks ? theta.rows : kMaxChunks;
  bool ok = true;
  parallel_for(chunks, threads, [&](int64_t chunk) {
    RowBuffer<T> short_row(long_rows ? 1 : theta.n, ok);
    FeatureWork<T> work(harmonics, ok);
    for (int64_t r = chunk * theta.rows / chunks; r < (chunk + 1) * theta.rows / chunks && !failed(ok); ++r) {
      const auto phases = [&](int64_t begin, int64_t count, T* scratch) {
        T* row = scratch ? scratch : static_cast<T*>(short_row);
        const int64_t at = r * theta.row_stride + begin * theta.column_stride;
        load_row<T>(theta.code, element(theta.data, theta.code, at), theta.column_stride, count, row);
        return static_cast<const T*>(row);
      };
      row_features<T>(theta.n, harmonics, long_rows ? threads : 1, phases, work, theta.code,
                      element(features, theta.code, r * 3 * harmonics), ok);
    }
  });
  return ok;
}

template <class T>
bool backward(const PhaseRows& theta, int harmonics, const void* features, const void* gradient, void* grad_theta,
              int threads) {
  const int64_t blocks = (theta.n + kBlock - 1) / kBlock;
  const int64_t chunks = theta.rows < kMaxChunks ? theta.rows : kMaxChunks;
  const int64_t longest = theta.n < kBlock ? theta.n : kBlock;
  bool ok = true;
  // a piece is a chunk of rows, or one block of one row
  parallel_for(blocks == 1 ? chunks : theta.rows * blocks, threads, [&](int64_t piece) {
    RowBuffer<T> phases(longest, ok), g(longest, ok);
    Buffer<T> numbers(kMaxGroupNumbers, ok), rest(8 * harmonics, ok);
    if (failed(ok)) return;
    const int64_t first = blocks == 1 ? piece * theta.rows / chunks : piece / blocks;
    const int64_t last = blocks == 1 ? (piece + 1) * theta.rows / chunks : first + 1;
    const int64_t begin = blocks == 1 ? 0 : piece % blocks * kBlock;
    const int64_t count = theta.n - begin < longest ? theta.n - begin : longest;
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * theta.row_stride + begin * theta.column_stride;
      load_row<T>(theta.code, element(theta.data, theta.code, at), theta.column_stride, count, phases);
      adjoint_numbers<T>(theta.code, element(features, theta.code, r * 3 * harmonics),
                         element(gradient, theta.code, r * 3 * harmonics), theta.n, harmonics, rest, numbers);
      zero<T>(g, count);
      harmonic_adjoint<T>(phases, count, harmonics, numbers, g);
      store_row<T>(theta.code, element(grad_theta, theta.code, r * theta.n + begin), count, g);
    }
  });
  return ok;
}

}  // namespace

bool order_parameters_forward(const PhaseRows& theta, int harmonics, void* features, int threads) {
  threads = worth_threads(work(theta, harmonics), threads);
  return theta.code == kFloat64 ? forward<double>(theta, harmonics, features, threads)
                                : forward<float>(theta, harmonics, features, threads);
}

bool order_parameters_backward(const PhaseRows& theta, int harmonics, const void* features, const void* gradient,
                               void* grad_theta, int threads) {
  threads = worth_threads(work(theta, harmonics), threads);
  return theta.code == kFloat64 ? backward<double>(theta, harmonics, features, gradient, grad_theta, threads)
                                : backward<float>(theta, harmonics, features, gradient, grad_theta, threads);
}

KSSM_NAMESPACE_END
