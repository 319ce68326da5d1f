// One thread's run of elements in the sign-split EMA step: where they lie, how the means are stored, random words.
#pragma once

#include "team.h"

#include "../math/philox.h"
#include "../math/sign_split.h"
#include "../math/state_rounding.h"

KSSM_NAMESPACE_BEGIN

struct Dynamic8 {  // a code of state_rounding.h; every 256 of them share a scale
  uint8_t code;
};
constexpr int64_t kScaleBlock = 256;
template <> inline constexpr int64_t kCode<Dynamic8> = kDynamic8;

// Elements that a thread steps at once: 128 bits of the smaller of two types, and for the 8-bit means what makes a warp
// hold the 256 that share a scale.
template <class P, class S> constexpr int kRun = sizeof(P) == 2 || sizeof(S) <= 2 ? 8 : 4;

template <class E> KSSM_DEVICE E* element(int64_t address, int64_t i) { return reinterpret_cast<E*>(address) + i; }

// ---- elements of a type that is known at run time: one by one, for what only a foreign checkpoint brings ----

template <class T> KSSM_DEVICE T load_any(int64_t code, int64_t address, int64_t i) {
  switch (code) {
    case kFloat32: return static_cast<T>(load(element<const float>(address, i)));
    case kFloat64: return static_cast<T>(load(element<const double>(address, i)));
    case kBFloat16: return static_cast<T>(load(element<const BFloat16>(address, i)));
    default: return static_cast<T>(load(element<const Float16>(address, i)));
  }
}

template <class T> KSSM_DEVICE void store_any(int64_t code, int64_t address, int64_t i, T x) {
  switch (code) {
    case kFloat32: return store(element<float>(address, i), static_cast<float>(x));
    case kFloat64: return store(element<double>(address, i), static_cast<double>(x));
    case kBFloat16: return store(element<BFloat16>(address, i), static_cast<float>(x));
    default: return store(element<Float16>(address, i), static_cast<float>(x));
  }
}

// ---- runs of elements ----

// In words, of which each is one instruction (storage.h).
template <class S, int V> KSSM_DEVICE void load_bits(const S* p, S (&raw)[V]) {
  KSSM_COUNT_LOADED(p, sizeof(raw));
  if constexpr (sizeof(raw) == 8) {
    const uint64_t word = load_word(p);
    __builtin_memcpy(raw, &word, 8);
  } else {
    KSSM_UNROLL
    for (int i = 0; i < V; i += kVector<S>) {
      const uint4 words = load_words(p + i);
      __builtin_memcpy(raw + i, &words, 16);
    }
  }
}

template <class S, int V> KSSM_DEVICE void store_bits(S* p, const S (&raw)[V]) {
  KSSM_COUNT_STORED(p, sizeof(raw));
  if constexpr (sizeof(raw) == 8) {
    uint64_t word;
    __builtin_memcpy(&word, raw, 8);
    store_word(p, word);
  } else {
    KSSM_UNROLL
    for (int i = 0; i < V; i += kVector<S>) {
      uint4 words;
      __builtin_memcpy(&words, raw + i, 16);
      store_words(p + i, words);
    }
  }
}

// WHOLE: all V are there and lie on a multiple of 16 bytes; otherwise the first `left` one by one, and zeros.
template <bool WHOLE, class S, int V> KSSM_DEVICE void load_raw(const S* p, int64_t left, S (&raw)[V]) {
  if constexpr (WHOLE) {
    load_bits(p, raw);
  } else {
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) {
      raw[v] = S{};
      if (v >= left) continue;
      KSSM_COUNT_LOADED(p + v, sizeof(S));
      raw[v] = p[v];
    }
  }
}

template <bool WHOLE, class S, int V> KSSM_DEVICE void store_raw(S* p, int64_t left, const S (&raw)[V]) {
  if constexpr (WHOLE) {
    store_bits(p, raw);
  } else {
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) {
      if (v >= left) continue;
      KSSM_COUNT_STORED(p + v, sizeof(S));
      p[v] = raw[v];
    }
  }
}

template <bool WHOLE, class S, class T, int V>
KSSM_DEVICE void load_elements(int64_t code, int64_t address, int64_t i, int64_t left, T (&x)[V]) {
  if (code == kCode<S>) {
    S raw[V];
    load_raw<WHOLE>(element<const S>(address, i), left, raw);
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) x[v] = static_cast<T>(widen(raw[v]));
  } else {
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) x[v] = v < left ? load_any<T>(code, address, i + v) : T(0);
  }
}

template <bool WHOLE, class S, class T, int V>
KSSM_DEVICE void store_elements(int64_t code, int64_t address, int64_t i, int64_t left, const T (&x)[V]) {
  if (code == kCode<S>) {
    S raw[V];
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) raw[v] = narrow<S>(static_cast<Compute<S>>(x[v]));
    store_raw<WHOLE>(element<S>(address, i), left, raw);
  } else {
    KSSM_UNROLL
    for (int v = 0; v < V; ++v)
      if (v < left) store_any(code, address, i + v, x[v]);
  }
}

// ---- random words ----

// Lanes whose number has the bit `offset`, and those that have not, exchange the halves of x that `bit` tells apart.
template <int V> KSSM_DEVICE void exchange_bits(uint32_t (&x)[V], int bit, int offset) {
  const bool upper = threadIdx.x & static_cast<unsigned>(offset);
  KSSM_UNROLL
  for (int v = 0; v < V; ++v) {
    if (v & bit) continue;
    const uint32_t got = shuffle_xor(upper ? x[v] : x[v | bit], offset);
    if (upper) x[v] = got;
    else x[v | bit] = got;
  }
}

// The words of the thread's elements i .. i + V - 1 (kssm_kernels/optim/sign_split/_rounding.py). The 32 / V lanes of a group of
// 32 elements compute its eight Philox blocks, V / 4 each, and exchange the words: 160 operations and 8 shuffles for
// eight elements, where a block for each element would take 640, and more time than the memory does.
template <int V>
KSSM_DEVICE void random_words(uint64_t seed, int64_t step, int64_t stream, int64_t i, uint32_t (&x)[V]) {
  static_assert(V == 4 || V == 8, "bits of a lane and of a place in x");
  constexpr int L = kNoiseGroup / V;
  const int rank = static_cast<int>(threadIdx.x) % L;
  KSSM_UNROLL
  for (int k = 0; k < V / 4; ++k) {
    const int64_t block = i / kNoiseGroup * kNoiseLanes + rank / (L / 4) + 4 * (V == 8 ? k : rank % 2);
    const uint64_t s = static_cast<uint64_t>(stream);
    uint64_t c[4] = {static_cast<uint64_t>(block), static_cast<uint64_t>(step), s, s >> 32};
    philox_4x32(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    KSSM_UNROLL
    for (int w = 0; w < 4; ++w) x[4 * k + w] = static_cast<uint32_t>(c[w]);
  }
  // from word w1 w0 of block b2 b1 b0 in lane b1 b0 (b2 in front or behind) to element b in lane w
  exchange_bits(x, 2, L / 2);
  exchange_bits(x, 1, L / 4);
}

KSSM_DEVICE float on_bfloat16(float x, uint32_t random) { return widen(BFloat16{stochastic_bfloat16(x, random)}); }

// ---- the means, stored as S ----

struct MeanRun {
  int64_t address, scale, code;  // scale: address of the tensor's scales
  int64_t i, left;
  bool stochastic;
};

template <class S> struct Means {
  template <bool WHOLE, class T, int V> static KSSM_DEVICE void read(const MeanRun& run, T (&x)[V]) {
    load_elements<WHOLE, S>(run.code, run.address, run.i, run.left, x);
  }
  template <bool WHOLE, class T, int V, class Bits>
  static KSSM_DEVICE void write(const MeanRun& run, T (&x)[V], const uint32_t (&words)[V], Bits random) {
    if (kCode<S> == kBFloat16 && run.stochastic) {
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) x[v] = static_cast<T>(on_bfloat16(static_cast<float>(x[v]), random(words[v])));
    }
    store_elements<WHOLE, S>(run.code, run.address, run.i, run.left, x);
  }
};

// In the first level of cache: a table in constant memory serves one code at a time.
__device__ const DynamicMap dynamic_map = DynamicMap();

template <> struct Means<Dynamic8> {
  template <bool WHOLE, class T, int V> static KSSM_DEVICE void read(const MeanRun& run, T (&x)[V]) {
    static_assert(V * kWarp == kScaleBlock, "a warp's elements share a scale");
    const float scale = load(element<const float>(run.scale, run.i / kScaleBlock));
    uint8_t codes[V];
    load_raw<WHOLE>(element<const uint8_t>(run.address, run.i), run.left, codes);
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) x[v] = static_cast<T>(dynamic_map.value[codes[v]] * scale);
  }

  template <bool WHOLE, class T, int V, class Bits>
  static KSSM_DEVICE void write(const MeanRun& run, T (&x)[V], const uint32_t (&words)[V], Bits random) {
    float top = 0.0f;
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) top = larger(static_cast<float>(x[v]), top);  // zeros past the end
    KSSM_UNROLL
    for (int offset = 1; offset < kWarp; offset *= 2) top = larger(shuffle_xor(top, offset), top);
    const float over = top > 0.0f ? top : 1.0f;
    uint8_t codes[V];
    KSSM_UNROLL
    for (int v = 0; v < V; ++v) {
      const float offset = run.stochastic ? static_cast<float>(random(words[v])) * 0x1p-16f : 0.5f;
      const float code = dynamic_code<float>(static_cast<float>(x[v]) / over, offset);
      codes[v] = static_cast<uint8_t>(static_cast<int32_t>(code));
    }
    store_raw<WHOLE>(element<uint8_t>(run.address, run.i), run.left, codes);
    if (threadIdx.x % kWarp == 0) store(element<float>(run.scale, run.i / kScaleBlock), top);
  }
};

KSSM_NAMESPACE_END
