// The normal noise of one stretch of a row (csrc/math/philox.h), one vector of Philox blocks at a time.
#pragma once

#include "memory.h"

#include "../math/philox.h"

KSSM_NAMESPACE_BEGIN

// Consecutive blocks in consecutive lanes: even blocks' words come in the low halves of one vector, odd ones' of another.
KSSM_FN VecU interleave(VecUL even, VecUL odd) { return (VecU)((even & 0xffffffffu) | (odd << 32)); }

KSSM_FN void put_normals(VecF v, int64_t block, int word, float* out) {
  float lanes[kLanes<float>];
  store(lanes, v);
  constexpr int run = kLanes<float> < kNoiseLanes ? kLanes<float> : kNoiseLanes;
  for (int i = 0; i < kLanes<float>; i += run) {
    const int64_t b = block + i;
    __builtin_memcpy(out + b / kNoiseLanes * kNoiseGroup + word * kNoiseLanes + b % kNoiseLanes, lanes + i,
                     run * sizeof(float));
  }
}

// Normals of oscillators begin .. begin + count - 1 of a row; begin is a multiple of kNoiseGroup, out holds count + 127.
__attribute__((noinline)) inline void fill_normals(int64_t row, int64_t step, uint64_t seed, int64_t begin, int64_t count, float* out) {
  constexpr int W = kLanes<float>;
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t r = static_cast<uint64_t>(row);
  const VecUL when = VecUL{} + static_cast<uint64_t>(step), row_low = VecUL{} + r, row_high = VecUL{} + (r >> 32);
  VecUL places{};
  for (int i = 0; i < W / 2; ++i) places[i] = static_cast<uint64_t>(2 * i);
  const uint64_t first = static_cast<uint64_t>(begin / kNoiseGroup * kNoiseLanes);
  const int64_t blocks = (count + kNoiseGroup - 1) / kNoiseGroup * kNoiseLanes;
  for (int64_t block = 0; block < blocks; block += W) {
    const VecUL counter = places + (first + static_cast<uint64_t>(block));
    VecUL even[4] = {counter, when, row_low, row_high}, odd[4] = {counter + 1, when, row_low, row_high};
    philox_4x32(even, k0, k1);
    philox_4x32(odd, k0, k1);
    for (int word = 0; word < 4; word += 2) {
      const VecU w0 = interleave(even[word], odd[word]), w1 = interleave(even[word + 1], odd[word + 1]);
      VecF x, y;
      box_muller<VecF>((VecI)(w0 >> 8), (VecI)((w1 >> 6) & 0xffffffu), (VecI)(w1 >> 30),
                       [](VecI i) { return to_float(i); }, x, y);
      put_normals(x, block, word, out);
      put_normals(y, block, word + 1, out);
    }
  }
}

KSSM_FN VecF load_normals(const float* xi, float) { return load(xi); }
KSSM_FN VecD load_normals(const float* xi, double) {
  typedef float Half __attribute__((vector_size(kBytes / 2)));
  Half h;
  __builtin_memcpy(&h, xi, sizeof(h));
  return __builtin_convertvector(h, VecD);
}

KSSM_NAMESPACE_END
