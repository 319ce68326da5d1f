// Elements as they lie in memory, and as the arithmetic wants them: 16-bit types are widened to float, and rounded once
// (to nearest even) on their way back. Loads and stores of runs of elements, 128 bits at a time where addresses allow.
#pragma once

#include "launch.h"

KSSM_NAMESPACE_BEGIN

struct BFloat16 {
  uint16_t word;
};
struct Float16 {
  uint16_t word;
};

template <class S> struct Storage {
  using Compute = float;
};
template <> struct Storage<double> {
  using Compute = double;
};
template <class S> using Compute = typename Storage<S>::Compute;

template <class S> constexpr int64_t kCode = kFloat32;
template <> inline constexpr int64_t kCode<double> = kFloat64;
template <> inline constexpr int64_t kCode<BFloat16> = kBFloat16;
template <> inline constexpr int64_t kCode<Float16> = kFloat16;

KSSM_DEVICE float widen(float x) { return x; }
KSSM_DEVICE double widen(double x) { return x; }
KSSM_DEVICE float widen(BFloat16 x) {
  return from_bits<float>(static_cast<int32_t>(static_cast<uint32_t>(x.word) << 16));
}
KSSM_DEVICE float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.word));
  return y;
#else
  const int32_t sign = (x.word & 0x8000) << 16, rest = x.word & 0x7fff;
  const float magnitude = rest < 0x0400   ? static_cast<float>(rest) * 0x1p-24f
                          : rest < 0x7c00 ? from_bits<float>((rest << 13) + (112 << 23))
                                          : from_bits<float>((rest << 13) | 0x7f800000);
  return from_bits<float>(bits(magnitude) | sign);
#endif
}

template <class S> KSSM_DEVICE S narrow(Compute<S> x);
template <> KSSM_DEVICE float narrow<float>(float x) { return x; }
template <> KSSM_DEVICE double narrow<double>(double x) { return x; }
template <> KSSM_DEVICE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t u = static_cast<uint32_t>(bits(x));
  if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((u >> 16) | 0x40)};  // a NaN stays one
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <> KSSM_DEVICE Float16 narrow<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.word) : "f"(x));
  return y;
#else
  const uint32_t u = static_cast<uint32_t>(bits(x)), rest = u & 0x7fffffff;
  uint32_t y;
  if (rest > 0x7f800000) y = 0x7e00;
  else if (rest >= 0x47800000) y = 0x7c00;  // 2^16 and more
  else if (rest < 0x38800000)               // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits
    y = static_cast<uint32_t>(bits(from_bits<float>(static_cast<int32_t>(rest)) + 0.5f)) - 0x3f000000;
  else y = (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13;
  return {static_cast<uint16_t>((u >> 16 & 0x8000) | y)};
#endif
}

// Elements that one thread moves at once.
template <class S> constexpr int kVector = 16 / static_cast<int>(sizeof(S));

KSSM_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class S> KSSM_DEVICE Compute<S> load(const S* p) {
  KSSM_COUNT_LOADED(p, sizeof(S));
  return widen(*p);
}
template <class S> KSSM_DEVICE void store(S* p, Compute<S> x) {
  KSSM_COUNT_STORED(p, sizeof(S));
  *p = narrow<S>(x);
}

// An element of a type that is known at run time only.
template <class T> KSSM_DEVICE T load_coded(int64_t code, int64_t address, int64_t i) {
  if (code == kCode<T>) return load(reinterpret_cast<const T*>(address) + i);
  if (code == kBFloat16) return static_cast<T>(load(reinterpret_cast<const BFloat16*>(address) + i));
  return static_cast<T>(load(reinterpret_cast<const Float16*>(address) + i));
}

// x = the run's first COUNT elements; zeros past the `left` that exist.
template <class S, int COUNT>
KSSM_DEVICE void load_run(const S* p, int64_t stride, int64_t left, Compute<S> (&x)[COUNT]) {
  constexpr int V = kVector<S> < COUNT ? kVector<S> : COUNT;
  if (V == kVector<S> && stride == 1 && left >= COUNT && aligned(p)) {
    KSSM_COUNT_LOADED(p, COUNT * sizeof(S));
    KSSM_UNROLL
    for (int i = 0; i < COUNT; i += V) {
      const uint4 words = *reinterpret_cast<const uint4*>(p + i);
      S raw[V];
      __builtin_memcpy(raw, &words, sizeof(raw));
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) x[i + v] = widen(raw[v]);
    }
  } else {
    KSSM_UNROLL
    for (int i = 0; i < COUNT; ++i) x[i] = i < left ? load(p + i * stride) : Compute<S>(0);
  }
}

// In PTX, for nvcc merges a plain store of four words with the branch that stores them singly, into four stores.
KSSM_DEVICE void store_words(void* p, uint4 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :: "l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w) : "memory");
#else
  *static_cast<uint4*>(p) = words;
#endif
}

// Of global memory, at an address that comes from memory: by itself the compiler would take it for one of any kind.
KSSM_DEVICE uint4 load_words(const void* p) {
#if defined(__CUDA_ARCH__)
  uint4 words;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "l"(__cvta_generic_to_global(p)));
  return words;
#else
  return *static_cast<const uint4*>(p);
#endif
}
KSSM_DEVICE uint64_t load_word(const void* p) {
#if defined(__CUDA_ARCH__)
  uint64_t word;
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(word) : "l"(__cvta_generic_to_global(p)));
  return word;
#else
  return *static_cast<const uint64_t*>(p);
#endif
}
KSSM_DEVICE void store_word(void* p, uint64_t word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.b64 [%0], %1;" :: "l"(__cvta_generic_to_global(p)), "l"(word) : "memory");
#else
  *static_cast<uint64_t*>(p) = word;
#endif
}

template <class S, int COUNT> KSSM_DEVICE void store_run(S* p, int64_t left, const Compute<S> (&x)[COUNT]) {
  constexpr int V = kVector<S> < COUNT ? kVector<S> : COUNT;
  if (V == kVector<S> && left >= COUNT && aligned(p)) {
    KSSM_COUNT_STORED(p, COUNT * sizeof(S));
    KSSM_UNROLL
    for (int i = 0; i < COUNT; i += V) {
      S raw[V];
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) raw[v] = narrow<S>(x[i + v]);
      uint4 words;
      __builtin_memcpy(&words, raw, V * sizeof(S));
      store_words(p + i, words);
    }
  } else {
    KSSM_UNROLL
    for (int i = 0; i < COUNT; ++i)
      if (i < left) store(p + i, x[i]);
  }
}

// f.run<S>() for the storage type S of a code; what f returns, or an error code for a code unknown.
template <class F> int with_storage(int64_t code, const F& f) {
  switch (code) {
    case kFloat32: return f.template run<float>();
    case kFloat64: return f.template run<double>();
    case kBFloat16: return f.template run<BFloat16>();
    case kFloat16: return f.template run<Float16>();
    default: return kWrongCall;
  }
}

KSSM_NAMESPACE_END
