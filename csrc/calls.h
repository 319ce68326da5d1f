// Every call of native code: one struct each, which Python packs field for field (the _calls.py of each op's folder), and
// one list for each backend, which its table, its entry points and its bindings expand. Fields are 8 bytes long:
// addresses, sizes, strides in elements, dtype codes, flags and numbers; nothing of torch or Python. An address of 0
// stands for a tensor that is not there. What is made of this file's text is the ABI number of both libraries.
#pragma once

#include <stdint.h>

namespace kssm {

// dtype codes, as in kssm_kernels/ops/_dtypes.py; the last is of the optimizer's 8-bit means alone
enum Code : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16, kDynamic8 };

// ---- order_parameters ----

// Features and their gradient.
struct SavedFeatures {
  int64_t features, g_features, code;
};

struct OrderParametersForward {
  int64_t theta, rows, n, row_stride, column_stride, code, harmonics, features;
  int64_t row_block, workspace;  // on a device: oscillators that one team adds up; partial sums where a row has more
};
struct OrderParametersBackward {
  int64_t theta, rows, n, row_stride, column_stride, code, harmonics, features, g_features, g_theta;
};

// ---- kuramoto ----

// Element (row, j) lies at data + row * row_stride + j * column_stride, or is `value`; in the compute dtype.
struct Operand {
  int64_t data, row_stride, column_stride;
  double value;
  int64_t present;
};
// Where an operand's gradient goes, and over what it is summed.
struct Target {
  int64_t data, per_row, per_column;
};
struct KuramotoUpdate {
  int64_t rows, n;
  double dt;
  uint64_t seed;
  Operand coupling, omega, phase_lag, noise_scale;
};
struct KuramotoStart {
  int64_t theta, row_stride, column_stride, code;
};

// On the CPU a call does all of an op.
struct KuramotoForward {
  KuramotoUpdate update;
  KuramotoStart start;
  int64_t steps, harmonics, features, phases;
};
struct KuramotoBackward {
  KuramotoUpdate update;
  KuramotoStart start;
  int64_t steps, harmonics, features, phases, g_features, g_phases;
  Target targets[5];  // of theta and the operands
};

// On a device: the steps from number `first` on of rows that one team holds, ...
struct KuramotoFusedForward {
  KuramotoUpdate update;
  KuramotoStart start;
  int64_t keeping, first, steps, harmonics, features, phases, phases_code;  // keeping: _gpu.py
};
struct KuramotoFusedBackward {
  KuramotoUpdate update;
  KuramotoStart start;
  int64_t keeping, first, steps, states, harmonics;  // states: [steps - 1, rows, n], compute dtype
  SavedFeatures end;
  int64_t g, g_code;  // the gradient after the steps
  int64_t parts, accumulate;
  Target targets[5];
};
// ... and one step of longer rows, and its adjoint. code: of the arithmetic.
struct KuramotoStep {
  KuramotoUpdate update;
  int64_t keeping, code, state, moved, z, step, out;  // state, moved, out: [rows, n]; z: [rows, 3]
};
struct KuramotoAdjointSums {
  KuramotoUpdate update;
  int64_t code, state, z, g, sums, workspace;  // sums: [rows, 2], divided by n; workspace: [rows, blocks, 2] and more
};
struct KuramotoAdjointStep {
  KuramotoUpdate update;
  int64_t code, state, z, gz, step, g;
  Target targets[4];  // of the operands: [rows, n], or per row [rows, blocks]; all gain
};

// ---- bistable_coupling ----

struct BistableCouplingForward {
  int64_t params, rows, code;
  double low, high;
  int64_t k, u, delta;
};
struct BistableCouplingBackward {
  int64_t params, rows, code;
  double low, high;
  int64_t g_k, g_u, g_delta, g_params;
};

// ---- oscillator_scan ----

// Element (row, t, column) lies at data + row * row_stride + t * time_stride + column.
struct ScanSequence {
  int64_t data, row_stride, time_stride, code;
};
// What does not change with time, in the compute dtype, with its row stride.
struct ScanStart {
  int64_t phase_lag, lag_stride;              // [rows, heads]
  int64_t initial_re, initial_im, re_stride, im_stride;  // [rows, heads * oscillators]
};
// The closed loop: C [communities, heads * oscillators], U [4 heads * oscillators (+ heads with forget), 2 communities],
// dense, in the compute dtype, and the logits of how strongly a step listens. communities 0: an open loop.
struct ScanLoop {
  int64_t communities, c, u;
  ScanSequence listen;
};
struct OscillatorScan {
  int64_t rows, steps, heads, oscillators, code;  // code: of the arithmetic
  int64_t moebius, tied_leak, harmonics;
  ScanSequence p, q, gate, phase, coupling, forget;
  ScanStart start;
  ScanLoop loop;
  int64_t reset;                         // bytes [rows, steps]
  int64_t every, states_re, states_im;  // [rows, steps / every, heads * oscillators]: after steps every, 2 every, ..
};
struct OscillatorScanForward {
  OscillatorScan scan;
  int64_t order_re, order_im, order_code, last_re, last_im;
};
// Gradients of sequences are contiguous, in the dtypes of those they belong to. Those of the start are in the compute
// dtype, [rows, ..] or summed over the rows.
//
// What the gradients of C and U are products of, in the compute dtype: v(t-1) [rows, steps, heads * oscillators], F and
// the gradient of Y [rows, steps, 2 communities].
struct ScanLoopGradients {
  int64_t v_re, v_im, f, g_y, g_listen;
};
struct OscillatorScanBackward {
  OscillatorScan scan;
  int64_t g_order_re, g_order_im, order_code, g_last_re, g_last_im, g_states_re, g_states_im;
  int64_t g_p, g_q, g_gate, g_phase, g_coupling, g_forget;
  int64_t g_lag, g_initial_re, g_initial_im, lag_summed, re_summed, im_summed;
  ScanLoopGradients loop;
};

// ---- sign_split ----

struct SignSplitOptions {
  int64_t param_code, grad_code, state_code, mode;
  int64_t lazy, maximize, temperature, stochastic_param, stochastic_state, kahan;
  double beta, kappa, eps, decay, cryo, cool, heat, floor;
  uint64_t seed;
};
// One tensor: all dense, in the same order of elements. temperature is in the compute dtype, compensation bfloat16;
// the scales are float32, one for each 256 elements of 8-bit means; cryo is float32, one for each `row` elements; rms,
// float32, is that of P + N, read and written in consolidate; step, int64, counts the random words of stream `stream`.
struct SignSplitTensor {
  int64_t p, g, positive, negative, temperature, compensation, positive_scale, negative_scale, cryo, rms, step;
  int64_t n, row, stream;
};
struct SignSplit {
  SignSplitOptions options;
  int64_t tensors, tensor_count;  // tensors: SignSplitTensor [tensor_count]
  double lr, scale;
};
struct SignSplitDevice {
  SignSplitOptions options;
  int64_t tensors, gradients, first, tensor_count, chunks;  // first: [tensor_count + 1], numbers of the tensors' first chunks
  int64_t cryo_rows;                                 // some have cryo per row
  double lr, scale;                                  // where the addresses below are 0
  int64_t lr_at, lr_code, scale_at, scale_code, found_at, found_code;
  int64_t sums;  // double [chunks], in consolidate
};
struct Upload {
  int64_t source, target, words;  // addresses on the host and on the device, and how many words
};

}  // namespace kssm

// X(name, Call): bool name(const Call&, int threads, Watch*), false if memory ran out, with nothing promised about outputs
#define KSSM_CPU_CALLS(X)                                   \
  X(order_parameters_forward, OrderParametersForward)       \
  X(order_parameters_backward, OrderParametersBackward)     \
  X(kuramoto_forward, KuramotoForward)                      \
  X(kuramoto_backward, KuramotoBackward)                    \
  X(bistable_coupling_forward, BistableCouplingForward)     \
  X(bistable_coupling_backward, BistableCouplingBackward)   \
  X(oscillator_scan_forward, OscillatorScanForward)         \
  X(oscillator_scan_backward, OscillatorScanBackward)       \
  X(sign_split, SignSplit)

// X(name, Call): int name(const Call&, void* stream) on the current device, 0 or a code that kssm_cuda_error explains
#define KSSM_CUDA_CALLS(X)                                  \
  X(order_parameters_forward, OrderParametersForward)       \
  X(order_parameters_backward, OrderParametersBackward)     \
  X(kuramoto_forward, KuramotoFusedForward)                 \
  X(kuramoto_backward, KuramotoFusedBackward)               \
  X(kuramoto_step, KuramotoStep)                            \
  X(kuramoto_adjoint_sums, KuramotoAdjointSums)             \
  X(kuramoto_adjoint_step, KuramotoAdjointStep)             \
  X(bistable_coupling_forward, BistableCouplingForward)     \
  X(bistable_coupling_backward, BistableCouplingBackward)   \
  X(sign_split, SignSplitDevice)                            \
  X(upload, Upload)
