// Philox words of consecutive elements, in the order of csrc/cpu/noise.h, one vector of blocks at a time.
#pragma once

#include "noise.h"

KSSM_NAMESPACE_BEGIN

// Words of elements begin .. begin + count - 1 of tensor `index`; begin is a multiple of kNoiseGroup, out holds
// count + 127.
__attribute__((noinline)) inline void fill_words(int64_t index, int64_t step, uint64_t seed, int64_t begin,
                                                 int64_t count, uint32_t* out) {
  constexpr int W = kLanes<float>, run = W < kNoiseLanes ? W : kNoiseLanes;
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t r = static_cast<uint64_t>(index);
  const VecUL when = VecUL{} + static_cast<uint64_t>(step), low = VecUL{} + r, high = VecUL{} + (r >> 32);
  VecUL places{};
  for (int i = 0; i < W / 2; ++i) places[i] = static_cast<uint64_t>(2 * i);
  const uint64_t first = static_cast<uint64_t>(begin / kNoiseGroup * kNoiseLanes);
  const int64_t blocks = (count + kNoiseGroup - 1) / kNoiseGroup * kNoiseLanes;
  for (int64_t block = 0; block < blocks; block += W) {
    const VecUL counter = places + (first + static_cast<uint64_t>(block));
    VecUL even[4] = {counter, when, low, high}, odd[4] = {counter + 1, when, low, high};
    philox_4x32(even, k0, k1);
    philox_4x32(odd, k0, k1);
    for (int word = 0; word < 4; ++word) {
      uint32_t lanes[W];
      const VecU v = interleave(even[word], odd[word]);
      __builtin_memcpy(lanes, &v, sizeof(v));
      for (int i = 0; i < W; i += run) {
        const int64_t b = block + i;
        __builtin_memcpy(out + b / kNoiseLanes * kNoiseGroup + word * kNoiseLanes + b % kNoiseLanes, lanes + i,
                         run * sizeof(uint32_t));
      }
    }
  }
}

KSSM_NAMESPACE_END
