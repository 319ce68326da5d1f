// The part of CUDA that csrc/cuda uses, for a plain C++ compiler: the kernels' own sources run on the CPU, every thread
// a fiber, one block after another. What a GPU leaves open is set to do harm here: shared memory starts as NaN, threads
// run in an order of choice from barrier to barrier, and a barrier or shuffle that not all threads reach is an error.
// There is no __shared__: kernels take their shared memory by KSSM_SHARED, whose size the launch gives.
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>

#define KSSM_CUDA_ON_HOST 1

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define KSSM_SHARED(name) unsigned char* const name = kssm_host::shared_memory
#define KSSM_COUNT_LOADED(bytes) (kssm_host::bytes_loaded += static_cast<int64_t>(bytes))
#define KSSM_COUNT_STORED(bytes) (kssm_host::bytes_stored += static_cast<int64_t>(bytes))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace kssm_host {

struct Index {
  unsigned x, y, z;
};

extern unsigned char* shared_memory;
extern int64_t bytes_loaded, bytes_stored;

// Runs the kernel; 0, or kFailed, which error_text() explains.
constexpr int kFailed = 10003;
int run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);
const char* error_text();

void wait_for_block(const char* file, int line);
uint64_t wait_for_warp(unsigned mask, uint64_t value, int source_lane, const char* file, int line);
int lane();

template <class T> T exchange(unsigned mask, T x, int source_lane, const char* file, int line) {
  uint64_t word = 0;
  memcpy(&word, &x, sizeof(T));
  word = wait_for_warp(mask, word, source_lane, file, line);
  memcpy(&x, &word, sizeof(T));
  return x;
}

}  // namespace kssm_host

extern kssm_host::Index threadIdx, blockIdx, blockDim, gridDim;

// the place in the source is that of the call: default arguments are evaluated there
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  kssm_host::wait_for_block(file, line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  kssm_host::wait_for_warp(mask, 0, kssm_host::lane(), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int offset, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return kssm_host::exchange(mask, x, kssm_host::lane() ^ offset, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int source, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return kssm_host::exchange(mask, x, source & 31, file, line);
}

// one device, which is always the current one
inline int cudaGetDevice(int* device) {
  *device = -1;
  return 0;
}
inline int cudaSetDevice(int) { return 0; }
