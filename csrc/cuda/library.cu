// The library's C interface: a function for each call, and what it is.

#include "team.h"

KSSM_NAMESPACE_BEGIN

#ifndef KSSM_CUDA_BUILD
#define KSSM_CUDA_BUILD "for the host"
#endif

namespace {

// launcher(call) of the packed call's fields; a caller with other fields is turned away.
template <class Call>
int run(int (*launcher)(const Call&, void*), const void* packed, int64_t bytes, int device, void* stream) {
  if (bytes != static_cast<int64_t>(sizeof(Call))) return kWrongCall;
  Call call;
  memcpy(&call, packed, sizeof(Call));
  const OnDevice on(device);
  return on.error ? on.error : launcher(call, stream);
}

}  // namespace

#if defined(KSSM_CUDA_ON_HOST)  // where a test may link some of the kernels alone
#define KSSM_WEAK(name, Call) __attribute__((weak)) int name(const Call& call, void* stream);
KSSM_CUDA_CALLS(KSSM_WEAK)
#undef KSSM_WEAK
#endif

#define KSSM_ENTRY(name, Call)                                                                       \
  KSSM_EXPORT int kssm_cuda_##name(const void* packed, int64_t bytes, int device, void* stream) {    \
    return run<Call>(name, packed, bytes, device, stream);                                           \
  }
KSSM_CUDA_CALLS(KSSM_ENTRY)
#undef KSSM_ENTRY

KSSM_EXPORT const char* kssm_cuda_abi() { return KSSM_ABI; }
KSSM_EXPORT const char* kssm_cuda_build() { return KSSM_CUDA_BUILD; }

KSSM_EXPORT int kssm_cuda_on_host() {
#if defined(KSSM_CUDA_ON_HOST)
  return 1;
#else
  return 0;
#endif
}

// 0 where the driver is absent or too old.
KSSM_EXPORT int kssm_cuda_device_count() {
#if defined(KSSM_CUDA_ON_HOST)
  return 1;
#else
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess;
  cudaGetLastError();
  return found ? count : 0;
#endif
}

KSSM_EXPORT const char* kssm_cuda_error(int code) {
  if (code == kWrongCall) return "the library and its caller disagree on the call's fields";
  if (code == kTooLarge) return "more blocks of threads than a launch may have";
#if defined(KSSM_CUDA_ON_HOST)
  return kssm_host::error_text();
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

// For tests: teams of that many lanes whatever the row's length; 0: as ever.
KSSM_EXPORT void kssm_cuda_force_lanes(int lanes) { forced_lanes = lanes; }

KSSM_NAMESPACE_END
