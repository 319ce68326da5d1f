// Coupling strength of the bistable bank from its ten parameters per row. Equations: kssm_kernels/ops/bistable_coupling/__init__.py.
// A row is forty bytes and some twenty operations: less than waking a thread costs up to 10^5 rows, so one thread it is.

#include "../math/bistable_coupling.h"

#include "entry_points.h"
#include "memory.h"

KSSM_NAMESPACE_BEGIN

namespace {

KSSM_FN float exponential(float x) { return __builtin_expf(x); }
KSSM_FN double exponential(double x) { return __builtin_exp(x); }

// Row r of the parameters, and what follows from it.
template <class T> struct Row {
  T p[10];
  Bistable<T> y;

  template <class Call> Row(const Call& call, int64_t r, T low, T high) {
    load_row(call.code, element(pointer(call.params), call.code, r * 10), 1, 10, p);
    y = bistable(p, low, high, [](T x) { return exponential(x); });
  }
};

template <class T> void forward(const BistableCouplingForward& call) {
  const T low = static_cast<T>(call.low), high = static_cast<T>(call.high);
  T *const k = static_cast<T*>(pointer(call.k)), *const u = static_cast<T*>(pointer(call.u));
  T* const delta = static_cast<T*>(pointer(call.delta));
  for (int64_t r = 0; r < call.rows; ++r) {
    const Row<T> row(call, r, low, high);
    k[r] = T(2) * row.y.sigmoid;
    u[r] = row.y.u;
    delta[r] = row.y.delta;
  }
}

template <class T> void backward(const BistableCouplingBackward& call) {
  const T low = static_cast<T>(call.low), high = static_cast<T>(call.high);
  const T *const g_k = static_cast<T*>(pointer(call.g_k)), *const g_u = static_cast<T*>(pointer(call.g_u));
  const T* const g_delta = static_cast<T*>(pointer(call.g_delta));
  for (int64_t r = 0; r < call.rows; ++r) {
    const Row<T> row(call, r, low, high);
    T g[10];
    bistable_adjoint(row.p, row.y, low, high, g_k[r], g_u[r], g_delta[r], g);
    store_row(call.code, element(pointer(call.g_params), call.code, r * 10), 10, g);
  }
}

}  // namespace

bool bistable_coupling_forward(const BistableCouplingForward& call, int, Watch*) {
  if (call.code == kFloat64) forward<double>(call);
  else forward<float>(call);
  return true;
}

bool bistable_coupling_backward(const BistableCouplingBackward& call, int, Watch*) {
  if (call.code == kFloat64) backward<double>(call);
  else backward<float>(call);
  return true;
}

KSSM_NAMESPACE_END
