// The Python module _kssm_kernels_cpu: addresses, sizes, strides and dtype codes in, nothing else.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <new>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

constexpr int kAbi = 1;  // ABI in kssm_kernels/backends.py

struct InstructionSet {
  const kssm::Kernels* kernels;
  bool supported;
};

// Best first; __builtin_cpu_supports asks the operating system too.
std::vector<InstructionSet> instruction_sets() {
  return {
#if defined(KSSM_HAVE_AVX512)
      {&kssm::avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("fma")},
#endif
#if defined(KSSM_HAVE_AVX2)
      {&kssm::avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#if defined(KSSM_HAVE_NEON)
      {&kssm::neon::kernels, true},
#endif
#if defined(KSSM_HAVE_BASELINE)
      {&kssm::baseline::kernels, true},
#endif
  };
}

// KSSM_ISA names one; otherwise the best that this machine has.
const kssm::Kernels* chosen_kernels() {
  const char* wanted = std::getenv("KSSM_ISA");
  for (const auto& set : instruction_sets()) {
    if (wanted && *wanted ? std::string_view(wanted) == set.kernels->name && set.supported : set.supported)
      return set.kernels;
  }
  throw py::import_error(std::string("KSSM_ISA: got ") + (wanted ? wanted : "nothing") +
                         ", want an instruction set that this machine has and that was compiled");
}

const kssm::Kernels* active = nullptr;

// A child of fork() has the parent's OpenMP pool on paper but not its threads: waiting for them would hang. It works alone.
bool forked_child = false;
int usable(int threads) { return forked_child ? 1 : threads; }

void* address(uintptr_t value) { return reinterpret_cast<void*>(value); }

void check_memory(bool ok) {
  if (!ok) throw std::bad_alloc();
}

using Sizes = std::tuple<int64_t, int64_t, int, int64_t, int, int>;  // rows, n, dtype code, steps, harmonics, threads
using OperandArguments = std::tuple<uintptr_t, int64_t, int64_t, double>;
using Operands = std::array<OperandArguments, kssm::kOperands>;
using Flags = std::tuple<bool, bool, bool>;  // omega, lag, noise

kssm::KuramotoCall kuramoto_call(const Sizes& sizes, const std::tuple<double, uint64_t>& numbers, const Operands& operands,
                                 const Flags& has) {
  kssm::KuramotoCall call;
  std::tie(call.rows, call.n, call.code, call.steps, call.harmonics, call.threads) = sizes;
  std::tie(call.dt, call.seed) = numbers;
  std::tie(call.has_omega, call.has_lag, call.has_noise) = has;
  call.threads = usable(call.threads);
  for (int k = 0; k < kssm::kOperands; ++k) {
    const auto& [data, row_stride, column_stride, value] = operands[static_cast<size_t>(k)];
    call.operands[k] = {address(data), row_stride, column_stride, value};
  }
  return call;
}

void order_parameters_forward(uintptr_t theta, int64_t rows, int64_t n, int64_t row_stride, int64_t column_stride, int code,
                              int harmonics, uintptr_t features, int threads) {
  const py::gil_scoped_release release;
  check_memory(active->order_parameters_forward({address(theta), rows, n, row_stride, column_stride, code}, harmonics,
                                                address(features), usable(threads)));
}

void order_parameters_backward(uintptr_t theta, int64_t rows, int64_t n, int64_t row_stride, int64_t column_stride,
                               int code, int harmonics, uintptr_t features, uintptr_t gradient, uintptr_t grad_theta,
                               int threads) {
  const py::gil_scoped_release release;
  check_memory(active->order_parameters_backward({address(theta), rows, n, row_stride, column_stride, code}, harmonics,
                                                 address(features), address(gradient), address(grad_theta),
                                                 usable(threads)));
}

void kuramoto_forward(const Sizes& sizes, const std::tuple<double, uint64_t>& numbers, const Operands& operands,
                      const Flags& has, uintptr_t features, uintptr_t phases) {
  const kssm::KuramotoCall call = kuramoto_call(sizes, numbers, operands, has);
  const py::gil_scoped_release release;
  check_memory(active->kuramoto_forward(call, address(features), address(phases)));
}

void kuramoto_backward(const Sizes& sizes, const std::tuple<double, uint64_t>& numbers, const Operands& operands,
                       const Flags& has, const std::array<uintptr_t, 4>& saved,
                       const std::array<std::tuple<uintptr_t, bool, bool>, kssm::kOperands>& gradients) {
  const kssm::KuramotoCall call = kuramoto_call(sizes, numbers, operands, has);
  kssm::GradientTarget targets[kssm::kOperands];
  for (size_t k = 0; k < kssm::kOperands; ++k) {
    const auto& [data, per_row, per_column] = gradients[k];
    targets[k] = {address(data), per_row, per_column};
  }
  const kssm::KuramotoSaved tensors = {address(saved[0]), address(saved[1]), address(saved[2]), address(saved[3])};
  const py::gil_scoped_release release;
  check_memory(active->kuramoto_backward(call, tensors, targets));
}

void bistable_coupling_forward(uintptr_t params, int64_t rows, int code, double low, double high, uintptr_t coupling,
                               uintptr_t u, uintptr_t delta) {
  const py::gil_scoped_release release;
  active->bistable_forward(address(params), rows, code, low, high, address(coupling), address(u), address(delta));
}

void bistable_coupling_backward(uintptr_t params, int64_t rows, int code, double low, double high, uintptr_t g_coupling,
                                uintptr_t g_u, uintptr_t g_delta, uintptr_t grad_params) {
  const py::gil_scoped_release release;
  active->bistable_backward(address(params), rows, code, low, high, address(g_coupling), address(g_u), address(g_delta),
                            address(grad_params));
}

void arithmetic_floor(int64_t vectors, int harmonics, int threads) {
  const py::gil_scoped_release release;
  active->arithmetic_floor(vectors, harmonics, usable(threads));
}

}  // namespace

PYBIND11_MODULE(_kssm_kernels_cpu, m) {
  m.doc() = "CPU kernels of kssm_kernels; call them through that package.";
  active = chosen_kernels();
  pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
  m.attr("ABI") = kAbi;
#if defined(KSSM_BUILD)
  m.attr("BUILD") = KSSM_BUILD;
#else
  m.attr("BUILD") = "built by hand";
#endif
  m.def("instruction_set", [] { return active->name; });
  m.def("vector_bytes", [] { return active->vector_bytes; });
  m.def("order_parameters_forward", &order_parameters_forward);
  m.def("order_parameters_backward", &order_parameters_backward);
  m.def("kuramoto_forward", &kuramoto_forward);
  m.def("kuramoto_backward", &kuramoto_backward);
  m.def("bistable_coupling_forward", &bistable_coupling_forward);
  m.def("bistable_coupling_backward", &bistable_coupling_backward);
  m.def("arithmetic_floor", &arithmetic_floor);
}
