// Vectors of the instruction set this file is compiled for, as GCC/Clang vector extensions: the mathematics of
// csrc/math runs on them unchanged, if this header comes first (its templates look fma() up where they are defined). Only the fused multiply-add, the square root and "any lane" need intrinsics.
#pragma once

#include "../math/number.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

KSSM_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef int32_t VecI __attribute__((vector_size(kBytes)));
typedef int64_t VecL __attribute__((vector_size(kBytes)));
typedef uint32_t VecU __attribute__((vector_size(kBytes)));
typedef uint64_t VecUL __attribute__((vector_size(kBytes)));

template <> struct Number<VecF> {
  using Scalar = float;
  using Int = VecI;
};
template <> struct Number<VecD> {
  using Scalar = double;
  using Int = VecL;
};

template <class T> struct Simd;
template <> struct Simd<float> { using V = VecF; };
template <> struct Simd<double> { using V = VecD; };
template <class T> using Vec = typename Simd<T>::V;
template <class T> constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

// The zero-masked forms of AVX-512: GCC's unmasked ones read an undefined register, and warn of it.
#if defined(__AVX512F__)
KSSM_FN VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
KSSM_FN VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
KSSM_FN VecF square_root(VecF x) { return (VecF)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
KSSM_FN VecD square_root(VecD x) { return (VecD)_mm512_maskz_sqrt_pd(0xff, (__m512d)x); }
#elif defined(__AVX2__)
KSSM_FN VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
KSSM_FN VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
KSSM_FN VecF square_root(VecF x) { return (VecF)_mm256_sqrt_ps((__m256)x); }
KSSM_FN VecD square_root(VecD x) { return (VecD)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__aarch64__)
KSSM_FN VecF fma(VecF a, VecF b, VecF c) { return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
KSSM_FN VecD fma(VecD a, VecD b, VecD c) { return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
KSSM_FN VecF square_root(VecF x) { return (VecF)vsqrtq_f32((float32x4_t)x); }
KSSM_FN VecD square_root(VecD x) { return (VecD)vsqrtq_f64((float64x2_t)x); }
#else
KSSM_FN VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
KSSM_FN VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
#if defined(__SSE2__)
KSSM_FN VecF square_root(VecF x) { return (VecF)_mm_sqrt_ps((__m128)x); }
KSSM_FN VecD square_root(VecD x) { return (VecD)_mm_sqrt_pd((__m128d)x); }
#else
KSSM_FN VecF square_root(VecF x) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
KSSM_FN VecD square_root(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif
#endif

KSSM_FN VecF to_float(VecI x) { return __builtin_convertvector(x, VecF); }

// the product of a's low halves with b
KSSM_FN VecUL multiply_low(VecUL a, uint32_t b) {
  const VecUL y = VecUL{} + static_cast<uint64_t>(b);
#if defined(__AVX512F__)
  return (VecUL)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)y);
#elif defined(__AVX2__)
  return (VecUL)_mm256_mul_epu32((__m256i)a, (__m256i)y);
#elif defined(__SSE2__)
  return (VecUL)_mm_mul_epu32((__m128i)a, (__m128i)y);
#else
  return (a & 0xffffffffu) * y;
#endif
}

// mask: all bits or none in every lane. GCC takes the plain loop apart lane by lane: a sixth of a pass on AVX-512.
template <class I> KSSM_FN bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  VecL m;
  __builtin_memcpy(&m, &mask, sizeof(m));
  int64_t all = 0;
  for (int i = 0; i < kBytes / 8; ++i) all |= m[i];
  return all != 0;
#endif
}

template <class T> KSSM_FN Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T> KSSM_FN void store(T* p, Vec<T> v) { __builtin_memcpy(p, &v, sizeof(v)); }

// The first `left` lanes, zeros behind: for memory that ends inside a vector.
template <class T> KSSM_FN Vec<T> load(const T* p, int64_t left) {
  if (left >= kLanes<T>) return load(p);
  Vec<T> v{};
  for (int i = 0; i < left; ++i) v[i] = p[i];
  return v;
}

// Ones in the first `left` lanes.
template <class T> KSSM_FN Vec<T> ones(int64_t left) {
  if (left >= kLanes<T>) return splat<Vec<T>>(T(1));
  Vec<T> v{};
  for (int i = 0; i < left; ++i) v[i] = T(1);
  return v;
}

template <class T> KSSM_FN T lane_sum(Vec<T> v) {
  T part[kLanes<T>];
  store(part, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

KSSM_NAMESPACE_END
