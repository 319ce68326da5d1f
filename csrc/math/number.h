// The number type V of the mathematics: float or double (CUDA, scalar code), or a vector of them (csrc/cpu/simd.h).
//
// Everything lives in a namespace named after the instruction set it is compiled for, so that the linker cannot
// keep one set's copy of an inline function for another's caller. Contraction is off in every build: a fused
// multiply-add is written fma() where it is meant, and nowhere else, so that all backends round alike.
#pragma once

#include <stdint.h>

#ifndef KSSM_ISA
#define KSSM_ISA portable
#endif

#define KSSM_NAMESPACE_BEGIN namespace kssm { namespace KSSM_ISA {
#define KSSM_NAMESPACE_END } }

#if defined(__CUDACC__)
#define KSSM_FN __host__ __device__ __forceinline__
#else
#define KSSM_FN inline __attribute__((always_inline))
#endif

// In front of a loop: over arrays that are to stay in registers, or with a body that is to exist once.
#if defined(__CUDACC__)
#define KSSM_UNROLL _Pragma("unroll")
#define KSSM_ROLLED _Pragma("unroll 1")
#else
#define KSSM_UNROLL _Pragma("GCC unroll 64")
#define KSSM_ROLLED
#endif

// Without a fused multiply-add the range reduction needs shorter constants, and reaches less far.
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDACC__) || defined(KSSM_CUDA_ON_HOST)
#define KSSM_HAS_FMA 1
#else
#define KSSM_HAS_FMA 0
#endif

KSSM_NAMESPACE_BEGIN

template <class V> struct Number;  // Scalar: element type; Int: integers of the same shape

template <> struct Number<float> {
  using Scalar = float;
  using Int = int32_t;
};

template <> struct Number<double> {
  using Scalar = double;
  using Int = int64_t;
};

template <class V> using Scalar = typename Number<V>::Scalar;
template <class V> using Int = typename Number<V>::Int;

template <class V> KSSM_FN V splat(Scalar<V> x) { return x - V{}; }

template <class V> KSSM_FN Int<V> bits(V x) {
  Int<V> i;
  __builtin_memcpy(&i, &x, sizeof(V));
  return i;
}

template <class V> KSSM_FN V from_bits(Int<V> i) {
  V x;
  __builtin_memcpy(&x, &i, sizeof(V));
  return x;
}

#if KSSM_HAS_FMA
KSSM_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
KSSM_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
KSSM_FN float fma(float a, float b, float c) { return a * b + c; }
KSSM_FN double fma(double a, double b, double c) { return a * b + c; }
#endif

// Whether a comparison holds in any lane.
KSSM_FN bool any(bool x) { return x; }

KSSM_FN float square_root(float x) { return __builtin_sqrtf(x); }
KSSM_FN double square_root(double x) { return __builtin_sqrt(x); }

KSSM_NAMESPACE_END
