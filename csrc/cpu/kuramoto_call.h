// A call of the Kuramoto update as its kernels read it.
#pragma once

#include "memory.h"
#include "watch.h"

KSSM_NAMESPACE_BEGIN

// value + data[row * row_stride + j * column_stride], in the compute dtype (theta: in its own); data null: the value
struct OperandRows {
  const void* data;
  int64_t row_stride, column_stride;
  double value;
};

// Where an operand's gradient goes (null: not wanted) and over what it is summed.
struct GradientTarget {
  void* data;
  bool per_row, per_column;
};

enum { kTheta, kCoupling, kOmega, kPhaseLag, kNoiseScale, kOperands };

struct KuramotoSaved {
  const void* features;       // null without harmonics
  const void* phases;         // null: recomputed
  const void* grad_features;  // null: zero
  const void* grad_phases;    // null: zero
};

struct KuramotoCall {
  int64_t rows, n, code, steps;
  int harmonics;  // 0: no features
  int threads;
  double dt;
  uint64_t seed;
  OperandRows operands[kOperands];
  bool has_omega, has_phase_lag, has_noise;
  Watch* watch;  // for signals, if the call is long

  template <class Call>
  KuramotoCall(const Call& call, int usable, Watch* watching)
      : rows(call.update.rows), n(call.update.n), code(call.start.code), steps(call.steps),
        harmonics(static_cast<int>(call.harmonics)), threads(usable), dt(call.update.dt), seed(call.update.seed),
        operands{{pointer(call.start.theta), call.start.row_stride, call.start.column_stride, 0.0},
                 rows_of(call.update.coupling), rows_of(call.update.omega), rows_of(call.update.phase_lag),
                 rows_of(call.update.noise_scale)},
        has_omega(call.update.omega.present), has_phase_lag(call.update.phase_lag.present),
        has_noise(call.update.noise_scale.present), watch(watching) {}

 private:
  static OperandRows rows_of(const Operand& operand) {
    return {pointer(operand.data), operand.row_stride, operand.column_stride, operand.value};
  }
};

KSSM_NAMESPACE_END
