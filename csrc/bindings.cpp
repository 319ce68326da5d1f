// The Python module _kssm_kernels_cpu: addresses, sizes, strides and dtype codes in, nothing else.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <time.h>

#include <cstdlib>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace kssm {

namespace {
constexpr int64_t kInterval = 100'000'000;  // ns between two looks for signals
constexpr int64_t kBudget = 1 << 14;        // work between two looks at the clock: a millisecond at most

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}
}  // namespace

Watch::Watch(bool (*signalled)())
    : signalled_(signalled), caller_(pthread_self()), due_(now() + kInterval), budget_(kBudget) {}

bool Watch::stopped() const { return __atomic_load_n(&stopped_, __ATOMIC_RELAXED); }
bool Watch::on_caller() const { return pthread_equal(pthread_self(), caller_) != 0; }

bool Watch::stop(int64_t work) {
  if (stopped()) return true;
  if (!on_caller() || (budget_ -= work) > 0) return false;
  budget_ = kBudget;
  if (now() < due_) return false;
  if (signalled_()) __atomic_store_n(&stopped_, true, __ATOMIC_RELAXED);
  due_ = now() + kInterval;
  return stopped();
}

}  // namespace kssm

namespace {

constexpr int kAbi = 4;  // ABI in kssm_kernels/backends.py

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
  std::string names;
  for (const auto& set : instruction_sets())
    if (set.supported) names += std::string(names.empty() ? "" : ", ") + set.kernels->name;
  throw py::import_error(std::string("KSSM_ISA: got ") + wanted + ", want one of " + names);
}

const kssm::Kernels* active = nullptr;

// A child of fork() has the parent's OpenMP pool on paper but not its threads: waiting for them would hang. It works alone.
bool forked_child = false;
int usable(int threads) { return forked_child ? 1 : threads; }

void* address(uintptr_t value) { return reinterpret_cast<void*>(value); }

void check_memory(bool ok) {
  if (!ok) throw std::bad_alloc();
}

bool signalled() {
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// kernel(watch) without the interpreter's lock; raises what a signal's handler has raised meanwhile.
template <class F> void run_watched(const F& kernel) {
  kssm::Watch watch(signalled);
  bool ok;
  {
    const py::gil_scoped_release release;
    ok = kernel(&watch);
  }
  if (watch.stopped()) throw py::error_already_set();
  check_memory(ok);
}

// Reads one flat tuple of numbers: a third of what pybind11 takes to convert the same in nested tuples (0.8 us, not 2.3).
class Reader {
 public:
  Reader(const py::tuple& arguments, py::ssize_t count) : arguments_(arguments) {
    if (arguments.size() != static_cast<size_t>(count))
      throw py::type_error("got " + std::to_string(arguments.size()) + " arguments, want " + std::to_string(count));
  }
  int64_t integer() { return checked(PyLong_AsLongLong(next())); }
  uint64_t word() { return checked(PyLong_AsUnsignedLongLong(next())); }
  double number() { return checked(PyFloat_AsDouble(next())); }
  void* address() { return reinterpret_cast<void*>(static_cast<uintptr_t>(word())); }
  bool flag() { return next() == Py_True; }

 private:
  PyObject* next() { return PyTuple_GET_ITEM(arguments_.ptr(), next_++); }
  template <class T> static T checked(T value) {
    if (value == static_cast<T>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  const py::tuple& arguments_;
  py::ssize_t next_ = 0;
};

// In the order of call_arguments in kssm_kernels/ops/_update_cpu.py.
constexpr py::ssize_t kCallArguments = 11 + 4 * kssm::kOperands;

kssm::KuramotoCall kuramoto_call(Reader& in) {
  kssm::KuramotoCall call;
  call.watch = nullptr;
  call.rows = in.integer();
  call.n = in.integer();
  call.code = static_cast<int>(in.integer());
  call.steps = in.integer();
  call.harmonics = static_cast<int>(in.integer());
  call.threads = usable(static_cast<int>(in.integer()));
  call.dt = in.number();
  call.seed = in.word();
  call.has_omega = in.flag();
  call.has_lag = in.flag();
  call.has_noise = in.flag();
  for (auto& operand : call.operands) {
    operand.data = in.address();
    operand.row_stride = in.integer();
    operand.column_stride = in.integer();
    operand.value = in.number();
  }
  return call;
}

void order_parameters_forward(uintptr_t theta, int64_t rows, int64_t n, int64_t row_stride, int64_t column_stride, int code,
                              int harmonics, uintptr_t features, int threads) {
  run_watched([&](kssm::Watch* watch) {
    return active->order_parameters_forward({address(theta), rows, n, row_stride, column_stride, code, watch}, harmonics,
                                            address(features), usable(threads));
  });
}

void order_parameters_backward(uintptr_t theta, int64_t rows, int64_t n, int64_t row_stride, int64_t column_stride,
                               int code, int harmonics, uintptr_t features, uintptr_t gradient, uintptr_t grad_theta,
                               int threads) {
  run_watched([&](kssm::Watch* watch) {
    return active->order_parameters_backward({address(theta), rows, n, row_stride, column_stride, code, watch}, harmonics,
                                             address(features), address(gradient), address(grad_theta),
                                             usable(threads));
  });
}

void kuramoto_forward(const py::tuple& arguments, uintptr_t features, uintptr_t phases) {
  Reader in(arguments, kCallArguments);
  kssm::KuramotoCall call = kuramoto_call(in);
  run_watched([&](kssm::Watch* watch) {
    call.watch = watch;
    return active->kuramoto_forward(call, address(features), address(phases));
  });
}

// gradients: address, per row, per column of each operand's
void kuramoto_backward(const py::tuple& arguments, uintptr_t features, uintptr_t phases, uintptr_t grad_features,
                       uintptr_t grad_phases, const py::tuple& gradients) {
  Reader in(arguments, kCallArguments), out(gradients, 3 * kssm::kOperands);
  kssm::KuramotoCall call = kuramoto_call(in);
  kssm::GradientTarget targets[kssm::kOperands];
  for (auto& target : targets) {
    target.data = out.address();
    target.per_row = out.flag();
    target.per_column = out.flag();
  }
  const kssm::KuramotoSaved saved = {address(features), address(phases), address(grad_features), address(grad_phases)};
  run_watched([&](kssm::Watch* watch) {
    call.watch = watch;
    return active->kuramoto_backward(call, saved, targets);
  });
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

// In the order of call_arguments in kssm_kernels/optim/_cpu.py.
void sign_split(const py::tuple& arguments) {
  Reader in(arguments, 24);
  kssm::SignSplitCall call;
  call.tensors = static_cast<const kssm::SignSplitTensor*>(in.address());
  call.count = in.integer();
  for (int* code : {&call.param_code, &call.grad_code, &call.state_code, &call.mode})
    *code = static_cast<int>(in.integer());
  for (bool* flag : {&call.lazy, &call.maximize, &call.temperature, &call.stochastic_param, &call.stochastic_state,
                     &call.kahan})
    *flag = in.flag();
  call.threads = usable(static_cast<int>(in.integer()));
  for (double* number : {&call.lr, &call.beta, &call.kappa, &call.eps, &call.decay, &call.cryo, &call.scale, &call.cool,
                         &call.heat, &call.floor})
    *number = in.number();
  call.seed = in.word();
  const py::gil_scoped_release release;
  check_memory(active->sign_split(call));
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
  py::list sets;
  for (const auto& set : instruction_sets())
    if (set.supported) sets.append(set.kernels->name);
  m.attr("INSTRUCTION_SETS") = sets;  // those that KSSM_ISA may name here, best first
  m.def("instruction_set", [] { return active->name; });
  m.def("vector_bytes", [] { return active->vector_bytes; });
  m.def("order_parameters_forward", &order_parameters_forward);
  m.def("order_parameters_backward", &order_parameters_backward);
  m.def("kuramoto_forward", &kuramoto_forward);
  m.def("kuramoto_backward", &kuramoto_backward);
  m.def("bistable_coupling_forward", &bistable_coupling_forward);
  m.def("bistable_coupling_backward", &bistable_coupling_backward);
  m.def("sign_split", &sign_split);
  m.def("arithmetic_floor", &arithmetic_floor);
}
