// The part of CUDA that csrc/cuda uses, for a plain C++ compiler: the kernels' own sources run on the CPU, every thread
// a fiber, one block after another. What a GPU leaves open is set to do harm here: shared memory starts as NaN, threads
// run in an order of choice from barrier to barrier, and a barrier or shuffle that not all threads reach is an error.
// There is no __shared__: kernels take their shared memory by KSSM_SHARED, whose size the launch gives.
#pragma once

#include <stdint.h>
#include <string.h>

#include <functional>
#include <utility>
#include <vector>

#define KSSM_CUDA_ON_HOST 1

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define KSSM_SHARED(name) unsigned char* const name = kssm_host::shared_memory
#define KSSM_COUNT_LOADED(p, bytes) kssm_host::loaded.add(p, bytes)
#define KSSM_COUNT_STORED(p, bytes) kssm_host::stored.add(p, bytes)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace kssm_host {

struct Index {
  unsigned x, y, z;
};

extern unsigned char* shared_memory;

// Bytes that launches touch, each once a launch, from the first time they are asked for on.
struct Traffic {
  void add(const void* p, size_t count) {
    if (on) runs.emplace_back(reinterpret_cast<uintptr_t>(p), count);
  }
  void end_launch();

  bool on = false;
  int64_t bytes = 0;
  std::vector<std::pair<uintptr_t, size_t>> runs;  // address and length, of this launch
};
extern Traffic loaded, stored;

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
