// How host code reaches the device: the launchers of all calls (../calls.h), the current device, a launch, error codes.
#pragma once

#include "../calls.h"
#include "../math/number.h"

#include <string.h>

#if defined(__CUDACC__)
#define KSSM_COUNT_LOADED(p, bytes)
#define KSSM_COUNT_STORED(p, bytes)
#define KSSM_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
#define KSSM_DEVICE __device__ __forceinline__
#define KSSM_EXPORT extern "C" __attribute__((visibility("default")))

KSSM_NAMESPACE_BEGIN

constexpr int kWrongCall = 10001, kTooLarge = 10002;  // beside CUDA's own codes
constexpr int64_t kSharedBytes = 48 * 1024;           // what every device grants without being asked

// Makes a device the current one, and restores the one before.
class OnDevice {
 public:
  explicit OnDevice(int device) : error(cudaGetDevice(&before_)) {
    if (!error && device != before_) {
      error = cudaSetDevice(device);
      changed_ = !error;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  int error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

#define KSSM_DECLARE(name, Call) int name(const Call& call, void* stream);
KSSM_CUDA_CALLS(KSSM_DECLARE)
#undef KSSM_DECLARE

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, void* stream,
           Arguments... arguments) {
  if (blocks <= 0) return 0;
  if (blocks > INT32_MAX) return kTooLarge;
#if defined(__CUDACC__)
  cudaGetLastError();  // an earlier call's error is not this launch's
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#else
  (void)stream;
  return kssm_host::run(blocks, threads, shared, [=] { kernel(arguments...); });
#endif
}

KSSM_NAMESPACE_END
