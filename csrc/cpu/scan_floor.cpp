// The calibration loop of the benches for the oscillator scan: the arithmetic of its equations on vectors in registers,
// without loads, stores, exchanges of lanes, or a step that waits for the one before. Heads of eight oscillators,
// coupled, with a forget gate, four harmonics, as the benches have them.
//
// For each vector of oscillators and step, with the functions of ../math and without their guards and selections:
//
//                                forward                      backward
//                        stuart_landau  moebius       stuart_landau  moebius
//   sine with cosine           1           1                1           1
//   exponentials               1           1                1           1
//   divisions                  2           3                3           3
//   square roots               2           1                2           1
//   products                  18          24               33          42
//   multiply-adds             11          16               22          32
//   additions                 14          14               19          25
//
// A sine with its cosine is 3 products, 10 multiply-adds and an addition, an exponential 7, 10 and 1. For each eighth
// vector, the heads' numbers: the sigmoids of the forget gate and the coupling, and for moebius a softplus.
#include <initializer_list>

#include "entry_points.h"
#include "parallel.h"
#include "trig.h"

#include "../math/oscillator_step.h"

KSSM_NAMESPACE_BEGIN

namespace {

constexpr int kTogether = 4;  // vectors side by side: while one waits for a quotient, the others go on
constexpr int kHarmonics = 4, kHead = 8;

#if defined(__AVX512F__)
#define KSSM_REGISTER "v"
#elif defined(__x86_64__)
#define KSSM_REGISTER "x"
#elif defined(__aarch64__)
#define KSSM_REGISTER "w"
#else
#define KSSM_REGISTER "m"
#endif

// A number that the compiler does not know, and one that it may not leave out.
KSSM_FN void anew(VecF& x) { __asm__ volatile("" : "+" KSSM_REGISTER(x)); }
KSSM_FN void anew(Complex<VecF>& z) {
  anew(z.re);
  anew(z.im);
}
KSSM_FN void used(VecF x) { __asm__ volatile("" : : KSSM_REGISTER(x)); }
KSSM_FN void used(Complex<VecF> z) {
  used(z.re);
  used(z.im);
}
KSSM_FN void add(Complex<VecF>& sum, Complex<VecF> z) { sum = sum + z; }

template <bool MOEBIUS> class Floor {
 public:
  using V = VecF;

  // For each eighth vector.
  KSSM_FN void heads(bool backward) {
    anew(logit_);
    const V f = sigmoid(logit_).shut;
    anew(logit_);
    if (MOEBIUS) used(softplus(logit_));
    if (!MOEBIUS || backward) used(sigmoid(logit_).open);
    used(f);
    anew(field_);
  }

  KSSM_FN void forward() {
    WriteGates<V> g[kTogether];
    Complex<V> v[kTogether];
    gates(g);
    KSSM_UNROLL
    for (int p = 0; p < kTogether; ++p) {
      anew(z_);
      const Complex<V> z = step<MOEBIUS>(g[p].lam * z_, g[p].d + strength_ * field_);
      used(z);
      v[p] = seen<MOEBIUS>(z);
    }
    KSSM_UNROLL
    for (int p = 0; p < kTogether; ++p) {
      Complex<V> power = v[p];
      KSSM_UNROLL
      for (int n = 0; n < kHarmonics; ++n) {
        if (n) power = power * v[p];
        add(sums_[n], power);
      }
    }
  }

  KSSM_FN void backward() {
    WriteGates<V> g[kTogether];
    gates(g);
    KSSM_UNROLL
    for (int p = 0; p < kTogether; ++p) {
      anew(z_);
      const Complex<V> s = g[p].lam * z_, force = g[p].d + strength_ * field_;
      anew(z_);
      const StepAdjoint<V> back = step_adjoint<MOEBIUS>(s, force, z_, carry_ + read_by(z_));
      used(times_conjugate(back.s, g[p].lam));
      const InputGradients<V> y = input_gradients<MOEBIUS>(g[p], s, back);
      for (const V x : {y.p, y.q, y.gate, y.phase}) used(x);
      sums_[1].re = sums_[1].re + y.rho;
      add(sums_[2], back.force);
    }
  }

  KSSM_FN void end() const {
    for (const Complex<V>& sum : sums_) used(sum);
  }

 private:
  KSSM_FN void gates(WriteGates<V> (&g)[kTogether]) {
    KSSM_UNROLL
    for (int p = 0; p < kTogether; ++p) {
      for (V* x : {&p_, &q_, &gate_, &phase_, &keep_}) anew(*x);
      const V phase[1] = {phase_};
      V sin[1], cos[1];
      sincos<float, 1>(phase, sin, cos);
      g[p] = write_gates<MOEBIUS>(p_, q_, gate_, sin[0], cos[0], keep_);
    }
  }
  // What the readout hands to a state; its mean is made again for the field.
  KSSM_FN Complex<V> read_by(Complex<V> z) {
    const auto through = [&](Complex<V> v) {
      add(sums_[0], v);
      return readout_adjoint(v, kHarmonics, [&](int64_t) { return field_; });
    };
    if constexpr (MOEBIUS) {
      return through(z);
    } else {
      const Squashed<V> y = squash(z);
      return y.adjoint(through(y.u));
    }
  }

  V p_ = splat<V>(0.3f), q_ = splat<V>(-0.4f), gate_ = splat<V>(-0.5f), phase_ = splat<V>(0.7f), keep_ = splat<V>(0.9f);
  V logit_ = splat<V>(-0.2f), strength_ = splat<V>(0.1f);
  Complex<V> z_ = {splat<V>(0.3f), splat<V>(0.2f)}, field_ = {splat<V>(0.1f), splat<V>(0.3f)};
  Complex<V> carry_ = {splat<V>(0.8f), splat<V>(0.6f)}, sums_[kHarmonics] = {};
};

template <bool MOEBIUS, bool BACKWARD> void scan_floor_of(int64_t vectors, int threads) {
  const int64_t chunk = 1024;
  parallel_for((vectors + chunk - 1) / chunk, threads, [&](int64_t i) {
    const int64_t count = vectors - i * chunk < chunk ? vectors - i * chunk : chunk;
    Floor<MOEBIUS> floor;
    for (int64_t v = 0; v < count; v += kHead) {
      floor.heads(BACKWARD);
      for (int k = 0; k < kHead; k += kTogether) {
        if constexpr (BACKWARD) floor.backward();
        else floor.forward();
      }
    }
    floor.end();
  });
}

}  // namespace

void scan_floor(int64_t vectors, bool moebius, bool backward, int threads) {
  const auto loop = moebius ? (backward ? scan_floor_of<true, true> : scan_floor_of<true, false>)
                            : (backward ? scan_floor_of<false, true> : scan_floor_of<false, false>);
  loop(vectors, threads);
}

KSSM_NAMESPACE_END
