// Kernels of a few lines for the emulation itself: what is right must pass, and each fault must be caught.

#include "launch.h"

KSSM_NAMESPACE_BEGIN

namespace {

constexpr int kThreads = 64;

// out[i] = in of the thread opposite, by way of shared memory
template <bool BARRIER> __global__ void reverse(const float* in, float* out) {
  KSSM_SHARED(shared);
  float* const row = reinterpret_cast<float*>(shared);
  row[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

// Half of the block waits for the other, which goes on to another barrier, or leaves.
template <bool LEAVES> __global__ void divergent(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (!LEAVES) {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void neighbours(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x] + __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

__global__ void missing_lane(const float* in, float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

// A shuffle among the lower half of each warp that asks a lane of the upper one.
__global__ void lane_outside(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 16);
}

__global__ void too_far(const float* in, float* out) {
  KSSM_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + 1] = in[threadIdx.x];
  out[threadIdx.x] = in[threadIdx.x];
}

}  // namespace

KSSM_EXPORT int kssm_faults_run(const char* name, const float* in, float* out) {
  const auto go = [&](void (*kernel)(const float*, float*)) {
    return launch(kernel, 1, kThreads, kThreads * int64_t{sizeof(float)}, nullptr, in, out);
  };
  if (!strcmp(name, "barrier")) return go(reverse<true>);
  if (!strcmp(name, "removed barrier")) return go(reverse<false>);
  if (!strcmp(name, "two barriers")) return go(divergent<false>);
  if (!strcmp(name, "left early")) return go(divergent<true>);
  if (!strcmp(name, "shuffle")) return go(neighbours);
  if (!strcmp(name, "missing lane")) return go(missing_lane);
  if (!strcmp(name, "lane outside")) return go(lane_outside);
  if (!strcmp(name, "too far")) return go(too_far);
  return kWrongCall;
}

KSSM_EXPORT const char* kssm_faults_error() { return kssm_host::error_text(); }

KSSM_NAMESPACE_END
