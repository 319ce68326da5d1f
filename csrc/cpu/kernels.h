// The entry points of one instruction set, and the arguments they take. Addresses, sizes, strides (in elements), dtype
// codes: nothing of torch or Python. Every function returns false if memory ran out, with nothing promised about its outputs.
#pragma once

#include <stdint.h>

namespace kssm {

struct PhaseRows {
  const void* data;
  int64_t rows, n, row_stride, column_stride;
  int code;
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
};

struct KuramotoSaved {
  const void* features;       // null without harmonics
  const void* phases;         // null: recomputed
  const void* grad_features;  // null: zero
  const void* grad_phases;    // null: zero
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
  void (*arithmetic_floor)(int64_t vectors, int harmonics, int threads);
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }

}  // namespace kssm
