// The entry points of one instruction set, and the arguments they take. Addresses, sizes, strides (in elements), dtype
// codes: nothing of torch or Python. Every function returns false if memory ran out, with nothing promised about its outputs.
#pragma once

#include <stdint.h>

#include "watch.h"

namespace kssm {

struct PhaseRows {
  const void* data;
  int64_t rows, n, row_stride, column_stride;
  int code;
  Watch* watch;  // for signals, if the call is long
};

// value + data[row * row_stride + j * column_stride], in the arithmetic dtype (theta: in its own); absent: data null, value 0
struct Operand {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  double value = 0.0;
};

// Where an operand's gradient goes (null: not wanted) and over what it is summed.
struct GradientTarget {
  void* data = nullptr;
  bool per_row = false, per_column = false;
};

enum { kTheta, kCoupling, kOmega, kLag, kNoise, kOperands };

struct KuramotoCall {
  int64_t rows, n;
  int code;
  int64_t steps;
  int harmonics;  // 0: no features
  int threads;
  double dt;
  uint64_t seed;
  Operand operands[kOperands];
  bool has_omega, has_lag, has_noise;
  Watch* watch;  // for signals, if the call is long
};

struct KuramotoSaved {
  const void* features;       // null without harmonics
  const void* phases;         // null: recomputed
  const void* grad_features;  // null: zero
  const void* grad_phases;    // null: zero
};

// One tensor of an optimizer step; all dense, in the same order of elements. In the order of FIELDS in
// kssm_kernels/optim/_table.py, 8 bytes each.
struct SignSplitTensor {
  void* p;
  const void* g;
  void *positive, *negative;
  void* temperature;   // arithmetic dtype; null: off
  void* compensation;  // bfloat16; null: no Kahan summation
  float *positive_scale, *negative_scale;  // one per block of 256, of 8-bit states
  const float* cryo;     // one per row; null: all 1
  float* rms;            // of P + N, read and written in consolidate
  const int64_t* step;   // counter of the random words
  int64_t n, row, stream;  // elements, elements of a row, number of its random stream
};

enum { kDynamic8 = 4 };  // of state_code, beside the dtypes of memory.h

struct SignSplitCall {
  const SignSplitTensor* tensors;
  int64_t count;
  int param_code, grad_code, state_code, mode;
  bool lazy, maximize, temperature, stochastic_param, stochastic_state, kahan;
  int threads;
  double lr, beta, kappa, eps, decay, cryo, scale, cool, heat, floor;
  uint64_t seed;
};

struct Kernels {
  const char* name;
  int vector_bytes;
  bool (*order_parameters_forward)(const PhaseRows&, int harmonics, void* features, int threads);
  bool (*order_parameters_backward)(const PhaseRows&, int harmonics, const void* features, const void* gradient,
                                    void* grad_theta, int threads);
  bool (*kuramoto_forward)(const KuramotoCall&, void* features, void* phases);
  bool (*kuramoto_backward)(const KuramotoCall&, const KuramotoSaved&, const GradientTarget*);
  void (*bistable_forward)(const void* params, int64_t rows, int code, double low, double high, void* coupling, void* u,
                           void* delta);
  void (*bistable_backward)(const void* params, int64_t rows, int code, double low, double high, const void* g_coupling,
                            const void* g_u, const void* g_delta, void* grad_params);
  bool (*sign_split)(const SignSplitCall&);
  void (*arithmetic_floor)(int64_t vectors, int harmonics, int threads);
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }

}  // namespace kssm
