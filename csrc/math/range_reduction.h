// x = q pi/2 + r for any finite double, by multiplying the mantissa with the bits of 2/pi that matter (Payne and
// Hanek, SIGNUM 18 (1983)). Slow (about 30 ns): for phases past the reach of the polynomial reduction in sincos.h.
#pragma once

#include "number.h"

KSSM_NAMESPACE_BEGIN

struct Reduced {
  double r;    // |r| <= pi/4, NaN for an infinite or NaN x
  int64_t q;   // quadrant, mod 4
};

KSSM_FN Reduced reduce_exact(double x) {
  // 2/pi = 0.bits, after one word of zeros so that the window below may start before the first bit.
  static const uint64_t two_over_pi[21] = {
      0,
      0xa2f9836e4e441529u, 0xfc2757d1f534ddc0u, 0xdb6295993c439041u, 0xfe5163abdebbc561u, 0xb7246e3a424dd2e0u,
      0x06492eea09d1921cu, 0xfe1deb1cb129a73eu, 0xe88235f52ebb4484u, 0xe99c7026b45f7e41u, 0x3991d639835339f4u,
      0x9c845f8bbdf9283bu, 0x1ff897ffde05980fu, 0xef2f118b5a0a6d1fu, 0x6d367ecf27cb09b7u, 0x4f463f669e5fea2du,
      0x7527bac7ebe5f17bu, 0x3d0739f78a5292eau, 0x6bfb5fb11f8d5d08u, 0x56033046fc7b6babu, 0xf0cfbc209af4361du};
  __extension__ typedef unsigned __int128 u128;

  const uint64_t b = static_cast<uint64_t>(bits(x));
  const int biased = static_cast<int>((b >> 52) & 0x7ff);
  if (biased == 0x7ff) return {__builtin_nan(""), 0};
  if (biased < 1023 - 1) return {x, 0};  // |x| < 1/2

  // |x| = m 2^e. Bits of 2/pi with weight 2^-i, i <= e - 2, contribute multiples of 4 turns of pi/2: skip them.
  const uint64_t m = (b & 0xfffffffffffffu) | 0x10000000000000u;
  const int start = (biased - 1075) - 2 + 64;  // first bit of the window, counted in two_over_pi
  const int word = start / 64, shift = start % 64;
  uint64_t p[3];
  KSSM_UNROLL
  for (int k = 0; k < 3; ++k) {
    const uint64_t high = two_over_pi[word + k], low = two_over_pi[word + k + 1];
    p[k] = shift ? (high << shift) | (low >> (64 - shift)) : high;
  }
  // low 192 bits of m * p: two bits of quadrant, 190 of fraction
  const u128 low = static_cast<u128>(m) * p[2];
  const u128 mid = static_cast<u128>(m) * p[1] + static_cast<uint64_t>(low >> 64);
  const uint64_t r0 = m * p[0] + static_cast<uint64_t>(mid >> 64);
  const uint64_t r1 = static_cast<uint64_t>(mid), r2 = static_cast<uint64_t>(low);
  int64_t q = static_cast<int64_t>(r0 >> 62);
  const uint64_t f0 = (r0 << 2) | (r1 >> 62), f1 = (r1 << 2) | (r2 >> 62);
  const int64_t f = static_cast<int64_t>(f0);  // a fraction of 1/2 or more reads as negative: the next quadrant's
  if (f < 0) q += 1;
  double r = (static_cast<double>(f) * 0x1p-64 + static_cast<double>(f1) * 0x1p-128) * 1.570796326794896558;
  if (x < 0) {
    r = -r;
    q = -q;
  }
  return {r, q & 3};
}

KSSM_NAMESPACE_END
