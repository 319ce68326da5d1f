// Rounding of the optimizer's numbers with 16 random bits, and the 8-bit dynamic map of its non-negative means.
// Definitions: kssm_kernels/optim/sign_split/_rounding.py.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

KSSM_FN float truncated(float x) { return static_cast<float>(static_cast<int32_t>(x)); }

// From one random word: 16 bits for the parameter, 16 for P, 16 for N (a multiplicative hash of all).
KSSM_FN uint32_t bits_for_parameter(uint32_t word) { return word >> 16; }
KSSM_FN uint32_t bits_for_positive(uint32_t word) { return word & 0xffffu; }
KSSM_FN uint32_t bits_for_negative(uint32_t word) { return (word * 0x9E3779B1u) >> 16; }

// Up with the probability of what is cut off. random: 16 bits. Infinity and NaN stay.
KSSM_FN uint16_t stochastic_bfloat16(float x, uint32_t random) {
  const uint32_t u = static_cast<uint32_t>(bits(x)), size = u & 0x7fffffffu;
  const uint32_t special = size > 0x7f800000u ? u | 0x400000u : u;
  return static_cast<uint16_t>((size < 0x7f800000u ? u + random : special) >> 16);
}

// Decade z of y in [0, 1], at most 7, holds 2^(7-z) codes, evenly spaced; y is its own top at 10^-z.
// offset: 1/2 rounds to nearest, a uniform number in [0, 1) stochastically.
// A vector of them goes through this unchanged; the code comes as a number, from 0 to 255.
template <class V> KSSM_FN V dynamic_code(V y, V offset) {
  const auto number = [](float x) { return splat<V>(x); };
  V up = number(1.0f), levels = number(128.0f);
  const auto from_decade = [&](float top, float scale, float count) {
    const auto below = y <= number(top);
    up = below ? number(scale) : up;
    levels = below ? number(count) : levels;
  };
  from_decade(1e-1f, 1e1f, 64.0f);
  from_decade(1e-2f, 1e2f, 32.0f);
  from_decade(1e-3f, 1e3f, 16.0f);
  from_decade(1e-4f, 1e4f, 8.0f);
  from_decade(1e-5f, 1e5f, 4.0f);
  from_decade(1e-6f, 1e6f, 2.0f);
  from_decade(1e-7f, 1e7f, 1.0f);
  const V scaled = y * up;
  // the last decade is evenly spaced from 0
  const V place = levels == number(1.0f) ? scaled : (scaled - number(0.1f)) * number(1.1111111f);
  V k = place * levels + offset;
  k = k > V{} ? truncated(k) : V{};
  return levels - number(1.0f) + (k < levels ? k : levels);
}

// The number of code c, in double, to be rounded to float32 once.
constexpr double dynamic_value(int c) {
  if (c == 0) return 0.0;
  double top = 1.0;
  int levels = 128;
  while (c < levels) {
    levels /= 2;
    top /= 10.0;
  }
  return levels == 1 ? top : top * (0.1 + 0.9 * (c + 1 - levels) / levels);
}

struct DynamicMap {
  float value[256];
  constexpr DynamicMap() : value() {
    for (int c = 0; c < 256; ++c) value[c] = static_cast<float>(dynamic_value(c));
  }
};

KSSM_NAMESPACE_END
