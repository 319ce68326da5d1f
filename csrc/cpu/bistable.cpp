// Coupling strength of the bistable bank from its ten parameters per row. Equations: kssm_kernels/ops/bistable_coupling.py.
// A row is forty bytes and some twenty operations: less than waking a thread costs up to 10^5 rows, so one thread it is.

#include "../math/bistable.h"

#include "entry_points.h"
#include "memory.h"

KSSM_NAMESPACE_BEGIN

namespace {

KSSM_FN float exponential(float x) { return __builtin_expf(x); }
KSSM_FN double exponential(double x) { return __builtin_exp(x); }

template <class T>
void forward(const void* params, int64_t rows, int code, T low, T high, T* coupling, T* u, T* delta) {
  for (int64_t r = 0; r < rows; ++r) {
    T p[10];
    load_row(code, element(params, code, r * 10), 1, 10, p);
    const Bistable<T> y = bistable(p, low, high, [](T x) { return exponential(x); });
    coupling[r] = T(2) * y.sigmoid;
    u[r] = y.u;
    delta[r] = y.delta;
  }
}

template <class T>
void backward(const void* params, int64_t rows, int code, T low, T high, const T* g_coupling, const T* g_u,
              const T* g_delta, void* grad) {
  for (int64_t r = 0; r < rows; ++r) {
    T p[10], g[10];
    load_row(code, element(params, code, r * 10), 1, 10, p);
    const Bistable<T> y = bistable(p, low, high, [](T x) { return exponential(x); });
    bistable_adjoint(p, y, low, high, g_coupling[r], g_u[r], g_delta[r], g);
    store_row(code, element(grad, code, r * 10), 10, g);
  }
}

}  // namespace

void bistable_forward(const void* params, int64_t rows, int code, double low, double high, void* coupling, void* u,
                      void* delta) {
  if (code == kFloat64)
    forward<double>(params, rows, code, low, high, static_cast<double*>(coupling), static_cast<double*>(u),
                    static_cast<double*>(delta));
  else
    forward<float>(params, rows, code, static_cast<float>(low), static_cast<float>(high), static_cast<float*>(coupling),
                   static_cast<float*>(u), static_cast<float*>(delta));
}

void bistable_backward(const void* params, int64_t rows, int code, double low, double high, const void* g_coupling,
                       const void* g_u, const void* g_delta, void* grad_params) {
  if (code == kFloat64)
    backward<double>(params, rows, code, low, high, static_cast<const double*>(g_coupling),
                     static_cast<const double*>(g_u), static_cast<const double*>(g_delta), grad_params);
  else
    backward<float>(params, rows, code, static_cast<float>(low), static_cast<float>(high),
                    static_cast<const float*>(g_coupling), static_cast<const float*>(g_u),
                    static_cast<const float*>(g_delta), grad_params);
}

KSSM_NAMESPACE_END
