// A step of the optimizer as its kernel reads it.
#pragma once

#include "memory.h"

KSSM_NAMESPACE_BEGIN

// One tensor of a call (SignSplitTensor in ../calls.h).
struct TensorAt {
  void* p;
  const void* g;
  void *positive, *negative, *temperature, *compensation;
  float *positive_scale, *negative_scale;
  const float* cryo;
  float* rms;
  const int64_t* step;
  int64_t n, row, stream;

  explicit TensorAt(const SignSplitTensor& t)
      : p(pointer(t.p)), g(pointer(t.g)), positive(pointer(t.positive)), negative(pointer(t.negative)),
        temperature(pointer(t.temperature)), compensation(pointer(t.compensation)),
        positive_scale(static_cast<float*>(pointer(t.positive_scale))),
        negative_scale(static_cast<float*>(pointer(t.negative_scale))),
        cryo(static_cast<const float*>(pointer(t.cryo))), rms(static_cast<float*>(pointer(t.rms))),
        step(static_cast<const int64_t*>(pointer(t.step))), n(t.n), row(t.row), stream(t.stream) {}
};

// The call as the kernels read it.
struct SignSplitCall {
  const SignSplitTensor* tensors;
  int64_t count, param_code, grad_code, state_code;
  int mode;
  bool lazy, maximize, temperature, stochastic_param, stochastic_state, kahan;
  int threads;
  double lr, beta, kappa, eps, decay, cryo, scale, cool, heat, floor;
  uint64_t seed;

  SignSplitCall(const SignSplit& call, int usable)
      : tensors(static_cast<const SignSplitTensor*>(pointer(call.tensors))), count(call.tensor_count),
        param_code(call.options.param_code), grad_code(call.options.grad_code), state_code(call.options.state_code),
        mode(static_cast<int>(call.options.mode)), lazy(call.options.lazy), maximize(call.options.maximize),
        temperature(call.options.temperature), stochastic_param(call.options.stochastic_param),
        stochastic_state(call.options.stochastic_state), kahan(call.options.kahan), threads(usable), lr(call.lr),
        beta(call.options.beta), kappa(call.options.kappa), eps(call.options.eps), decay(call.options.decay),
        cryo(call.options.cryo), scale(call.scale), cool(call.options.cool), heat(call.options.heat),
        floor(call.options.floor), seed(call.options.seed) {}
};

KSSM_NAMESPACE_END
