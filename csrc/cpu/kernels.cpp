#include "entry_points.h"
#include "harmonic_sums.h"

#define KSSM_STRING_(x) #x
#define KSSM_STRING(x) KSSM_STRING_(x)

KSSM_NAMESPACE_BEGIN

// Reordered, the loop below would need more than sixteen registers.
KSSM_FN void keep_order([[maybe_unused]] VecF& x) {
#if defined(__x86_64__) && !defined(__AVX512F__)
  __asm__ volatile("" : "+x"(x));
#endif
}

// The calibration loop of the benches: per harmonic and vector two fused multiply-adds (the recurrences of cosine and
// sine) and two additions (their sums), on registers, so that neither latency nor memory counts: two multiply-adds a
// cycle that take four want eight side by side, two additions that take three want six, and sixteen registers hold both.
// x x - 0.3 needs no register for a factor, and its x stay normal numbers.
void arithmetic_floor(int64_t vectors, int harmonics, int threads) {
  const int64_t chunk = 1024;
  parallel_for((vectors + chunk - 1) / chunk, threads, [&](int64_t i) {
    const int64_t count = vectors - i * chunk < chunk ? vectors - i * chunk : chunk;
    const VecF shift = splat<VecF>(-0.3f);
    VecF x[8], sum[6];
    for (int p = 0; p < 8; ++p) x[p] = splat<VecF>(0.1f * static_cast<float>(p));
    for (int p = 0; p < 6; ++p) sum[p] = VecF{};
    for (int64_t v = 0; v < count * harmonics; v += 12) {
#pragma GCC unroll 24
      for (int k = 0; k < 24; ++k) {
        x[k % 8] = fma(x[k % 8], x[k % 8], shift);
        sum[k % 6] = sum[k % 6] + x[k % 8];
        keep_order(sum[k % 6]);
      }
    }
    const VecF result = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + (sum[4] + sum[5]);
    __asm__ volatile("" : : "m"(result));  // keeps the loop
  });
}

#define KSSM_ENTRY(name, Call) name,
const Kernels kernels = {KSSM_STRING(KSSM_ISA), kBytes, arithmetic_floor, scan_floor, KSSM_CPU_CALLS(KSSM_ENTRY)};
#undef KSSM_ENTRY

KSSM_NAMESPACE_END
