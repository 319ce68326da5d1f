#include "entry_points.h"
#include "harmonic_sums.h"

#define KSSM_STRING_(x) #x
#define KSSM_STRING(x) KSSM_STRING_(x)

KSSM_NAMESPACE_BEGIN

// The calibration loop of the benches: per harmonic and vector two fused multiply-adds (the recurrences of cosine and
// sine) and two additions (their sums), six of each side by side on registers, so that neither latency nor memory counts.
void arithmetic_floor(int64_t vectors, int harmonics, int threads) {
  const int64_t piece = 1024;
  parallel_for((vectors + piece - 1) / piece, threads, [&](int64_t i) {
    const int64_t count = vectors - i * piece < piece ? vectors - i * piece : piece;
    const VecF factor = splat<VecF>(0.9f), shift = splat<VecF>(0.1f);
    VecF x[6], sum[6];
    for (int p = 0; p < 6; ++p) {
      x[p] = splat<VecF>(0.1f * static_cast<float>(p));
      sum[p] = VecF{};
    }
    for (int64_t v = 0; v < count * harmonics; v += 3) {
      for (int p = 0; p < 6; ++p) x[p] = fma(factor, x[p], shift);
      for (int p = 0; p < 6; ++p) sum[p] = sum[p] + x[p];
    }
    const VecF result = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + (sum[4] + sum[5]);
    __asm__ volatile("" : : "m"(result));  // keeps the loop
  });
}

const Kernels kernels = {
    KSSM_STRING(KSSM_ISA),     kBytes,           order_parameters_forward, order_parameters_backward, kuramoto_forward,
    kuramoto_backward,         bistable_forward, bistable_backward,        arithmetic_floor,
};

KSSM_NAMESPACE_END
