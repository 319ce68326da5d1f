// Work over threads with a result that does not depend on how many there are: work is cut by its size alone into
// pieces, a piece is computed by one thread, and pieces are combined in their order.
#pragma once

#include "simd.h"

KSSM_NAMESPACE_BEGIN

// Oscillators of one row that one thread takes at a time: 16 KiB of float phases, half a first-level cache.
constexpr int64_t kBlock = 4096;
// Groups of rows, at most; each owns a partial sum of what all rows share.
constexpr int64_t kMaxChunks = 128;

// Rows cut into chunks that begin at multiples of `together`, the rows that are computed at once.
struct Chunks {
  Chunks(int64_t all_rows, int64_t rows_together)
      : rows(all_rows), together(rows_together), sets((rows + together - 1) / together),
        count(sets < kMaxChunks ? sets : kMaxChunks) {}
  int64_t first(int64_t chunk) const { return chunk * sets / count * together; }
  int64_t last(int64_t chunk) const { return end_of(first(chunk + 1)); }
  int64_t end_of(int64_t row) const { return row < rows ? row : rows; }

  int64_t rows, together, sets, count;
};

using Task = void (*)(const void* body, int64_t i);

// Uses GOMP_parallel and nothing else of the OpenMP runtime, which every runtime torch ships with offers.
inline void run_tasks(int64_t count, int threads, Task task, const void* body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(body, i);
    return;
  }
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) break;
      task(body, i);
    }
  }
}

// body(i) for i = 0 .. count - 1; compiled once, not once for each way run_tasks may take.
template <class F> inline void parallel_for(int64_t count, int threads, const F& body) {
  run_tasks(count, threads, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &body);
}

// A problem below this many vector operations is done before a second thread is awake (docs/performance.md).
constexpr double kSerialWork = 1 << 15;

KSSM_FN int worth_threads(double vector_operations, int threads) { return vector_operations < kSerialWork ? 1 : threads; }

KSSM_NAMESPACE_END
