// The Python module _kssm_kernels_cpu: the calls of calls.h, packed by Python, and nothing else.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <time.h>

#include <cstdlib>
#include <cstring>
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

template <class Call> Call unpacked(const char* name, const py::bytes& packed) {
  const std::string_view bytes = packed;
  if (bytes.size() != sizeof(Call))
    throw py::type_error(std::string(name) + ": got " + std::to_string(bytes.size()) + " bytes, want " +
                         std::to_string(sizeof(Call)));
  Call call;
  std::memcpy(&call, bytes.data(), sizeof(Call));
  return call;
}

#define KSSM_FUNCTION(name, Call)                                                                             \
  void name(const py::bytes& packed, int threads) {                                                           \
    const Call call = unpacked<Call>(#name, packed);                                                          \
    run_watched([&](kssm::Watch* watch) { return active->name(call, usable(threads), watch); });              \
  }
namespace entry {
using namespace kssm;  // the calls' structs
KSSM_CPU_CALLS(KSSM_FUNCTION)
}  // namespace entry
#undef KSSM_FUNCTION

void arithmetic_floor(int64_t vectors, int harmonics, int threads) {
  const py::gil_scoped_release release;
  active->arithmetic_floor(vectors, harmonics, usable(threads));
}
void scan_floor(int64_t vectors, bool moebius, bool backward, int threads) {
  const py::gil_scoped_release release;
  active->scan_floor(vectors, moebius, backward, usable(threads));
}

}  // namespace

PYBIND11_MODULE(_kssm_kernels_cpu, m) {
  m.doc() = "CPU kernels of kssm_kernels; call them through that package.";
  active = chosen_kernels();
  pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
  m.attr("ABI") = KSSM_ABI;
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
#define KSSM_DEFINE(name, Call) m.def(#name, &entry::name);
  KSSM_CPU_CALLS(KSSM_DEFINE)
#undef KSSM_DEFINE
  m.def("arithmetic_floor", &arithmetic_floor);
  m.def("scan_floor", &scan_floor);
}
