// Work over threads with a result that does not depend on how many there are: work is cut by its size alone into
// chunks, a chunk is computed by one thread, and chunks are combined in their order.
#pragma once

#include <time.h>

#include "simd.h"
#include "watch.h"

KSSM_NAMESPACE_BEGIN

// Oscillators of one row that one thread takes at a time: 16 KiB of float phases, half a first-level cache.
constexpr int64_t kRowBlock = 4096;
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

// The caller's last tasks are done and others still run: it sleeps, and looks for signals.
inline void wait_for(const int64_t& done, int64_t count, Watch& watch) {
  const timespec nap = {0, 200'000};
  while (__atomic_load_n(&done, __ATOMIC_ACQUIRE) < count) {
    nanosleep(&nap, nullptr);
    watch.stop(INT64_C(1) << 62);
  }
}

// Uses GOMP_parallel and nothing else of the OpenMP runtime, which every runtime torch ships with offers. After a signal
// no further task is begun.
inline void run_tasks(int64_t count, int threads, Task task, const void* body, Watch* watch) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count && !(watch && watch->stop(1 << 12)); ++i) task(body, i);
    return;
  }
  int64_t next = 0, done = 0;
#pragma omp parallel num_threads(threads)
  {
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) break;
      if (!(watch && watch->stop(1 << 12))) task(body, i);
      __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE);
    }
    if (watch && watch->on_caller()) wait_for(done, count, *watch);
  }
}

// body(i) for i = 0 .. count - 1; compiled once, not once for each way run_tasks may take.
template <class F> inline void parallel_for(int64_t count, int threads, const F& body, Watch* watch = nullptr) {
  run_tasks(count, threads, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &body, watch);
}

// A problem below this many vector operations is done before a second thread is awake (docs/performance.md).
constexpr double kSerialWork = 1 << 15;

// A call of less work than this, a tenth of a second or so, is not watched for signals.
constexpr double kUnwatchedWork = 1e8;
KSSM_FN Watch* watched(Watch* watch, double vector_operations) {
  return vector_operations < kUnwatchedWork ? nullptr : watch;
}

KSSM_FN int worth_threads(double vector_operations, int threads) { return vector_operations < kSerialWork ? 1 : threads; }

KSSM_NAMESPACE_END
