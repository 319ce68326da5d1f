// Coupling strength of the bistable bank, and its adjoint: a thread for each row of ten parameters. A block's rows go
// through shared memory, so that global memory is read and written 128 bits at a time, whatever ten elements take.
// Equations: kssm_kernels/ops/bistable_coupling/__init__.py.

#include "storage.h"

#include "../math/bistable_coupling.h"

#include <math.h>

KSSM_NAMESPACE_BEGIN

namespace {

constexpr int kParameters = 10, kRows = 128;

struct Exponential {
  KSSM_DEVICE float operator()(float x) const { return expf(x); }
  KSSM_DEVICE double operator()(double x) const { return exp(x); }
};

// All of a block's elements, moved by all of its threads.
template <class S> KSSM_DEVICE void load_block(const S* from, int count, Compute<S>* to) {
  constexpr int V = kVector<S>;
  for (int i = static_cast<int>(threadIdx.x) * V; i < count; i += kRows * V) {
    Compute<S> x[V];
    load_run(from + i, 1, count - i, x);
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) to[i + v] = x[v];
  }
}
template <class S> KSSM_DEVICE void store_block(const Compute<S>* from, int count, S* to) {
  constexpr int V = kVector<S>;
  for (int i = static_cast<int>(threadIdx.x) * V; i < count; i += kRows * V) {
    Compute<S> x[V];
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) x[v] = from[i + v];
    store_run(to + i, count - i, x);
  }
}

template <class T> struct OwnRow {
  T p[kParameters];
  KSSM_DEVICE explicit OwnRow(const T* block) {
    KSSM_UNROLL
    for (int k = 0; k < kParameters; ++k) p[k] = block[threadIdx.x * kParameters + k];
  }
};

template <class T> KSSM_DEVICE T* at(int64_t address, int64_t r) { return reinterpret_cast<T*>(address) + r; }

KSSM_DEVICE int rows_here(int64_t rows) {
  const int64_t left = rows - static_cast<int64_t>(blockIdx.x) * kRows;
  return static_cast<int>(left < kRows ? left : kRows);
}

template <class S> __global__ void __launch_bounds__(kRows) forward(BistableCouplingForward call) {
  using T = Compute<S>;
  KSSM_SHARED(shared);
  T* const block = reinterpret_cast<T*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, r = first + threadIdx.x;
  const int count = rows_here(call.rows);
  load_block(at<const S>(call.params, first * kParameters), count * kParameters, block);
  __syncthreads();
  if (r >= call.rows) return;
  const OwnRow<T> own(block);
  const Bistable<T> y = bistable(own.p, static_cast<T>(call.low), static_cast<T>(call.high), Exponential{});
  store(at<T>(call.k, r), T(2) * y.sigmoid);
  store(at<T>(call.u, r), y.u);
  store(at<T>(call.delta, r), y.delta);
}

template <class S> __global__ void __launch_bounds__(kRows) backward(BistableCouplingBackward call) {
  using T = Compute<S>;
  KSSM_SHARED(shared);
  T* const block = reinterpret_cast<T*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, r = first + threadIdx.x;
  const int count = rows_here(call.rows);
  load_block(at<const S>(call.params, first * kParameters), count * kParameters, block);
  __syncthreads();
  if (r < call.rows) {
    const OwnRow<T> own(block);
    const T low = static_cast<T>(call.low), high = static_cast<T>(call.high);
    const Bistable<T> y = bistable(own.p, low, high, Exponential{});
    T g[kParameters];
    bistable_adjoint(own.p, y, low, high, load(at<const T>(call.g_k, r)), load(at<const T>(call.g_u, r)),
                     load(at<const T>(call.g_delta, r)), g);
    KSSM_UNROLL
    for (int k = 0; k < kParameters; ++k) block[threadIdx.x * kParameters + k] = g[k];
  }
  __syncthreads();
  store_block(block, count * kParameters, at<S>(call.g_params, first * kParameters));
}

template <class S, class Call> int launch_rows(void (*kernel)(Call), const Call& call, void* stream) {
  constexpr int64_t bytes = kRows * kParameters * sizeof(Compute<S>);
  return launch(kernel, (call.rows + kRows - 1) / kRows, kRows, bytes, stream, call);
}

struct RunForward {
  const BistableCouplingForward& call;
  void* stream;
  template <class S> int run() const { return launch_rows<S>(forward<S>, call, stream); }
};

struct RunBackward {
  const BistableCouplingBackward& call;
  void* stream;
  template <class S> int run() const { return launch_rows<S>(backward<S>, call, stream); }
};

}  // namespace

int bistable_coupling_forward(const BistableCouplingForward& call, void* stream) {
  return with_storage(call.code, RunForward{call, stream});
}

int bistable_coupling_backward(const BistableCouplingBackward& call, void* stream) {
  return with_storage(call.code, RunBackward{call, stream});
}

KSSM_NAMESPACE_END
