// Rows of phases in and out of the four dtypes, and scratch memory.
#pragma once

#include <stdlib.h>
#include <sys/mman.h>

#include "../calls.h"

#include "simd.h"

KSSM_NAMESPACE_BEGIN

// Arithmetic is float for the 16-bit ones.
template <class T> constexpr int64_t code_of() { return sizeof(T) == 8 ? kFloat64 : kFloat32; }
KSSM_FN int64_t dtype_size(int64_t code) { return code == kFloat32 ? 4 : code == kFloat64 ? 8 : 2; }

KSSM_FN void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }

KSSM_FN float bfloat16_to_float(uint16_t h) { return from_bits<float>(static_cast<int32_t>(static_cast<uint32_t>(h) << 16)); }

KSSM_FN uint16_t float_to_bfloat16(float x) {
  const uint32_t u = static_cast<uint32_t>(bits(x));
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

KSSM_FN float float16_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // scaling by 2^112 moves the exponent's bias and normalises subnormals alike
  const uint32_t finite = static_cast<uint32_t>(bits(from_bits<float>(static_cast<int32_t>(magnitude)) * 0x1p112f));
  const uint32_t u = (h & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite;
  return from_bits<float>(static_cast<int32_t>(u | (static_cast<uint32_t>(h & 0x8000u) << 16)));
}

KSSM_FN uint16_t float_to_float16(float x) {
  const uint32_t u = static_cast<uint32_t>(bits(x)), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
  const float magnitude = from_bits<float>(static_cast<int32_t>(size));
  // adding 1/2 rounds a subnormal result to its 2^-24 grid
  const uint32_t subnormal = static_cast<uint32_t>(bits(magnitude + 0.5f)) - 0x3f000000u;
  const uint32_t normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;  // rebias by -112, round to nearest even
  const uint32_t special = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (size >= 0x47800000u ? special : size < 0x38800000u ? subnormal : normal));
}

// count elements from `source` (of dtype code, `stride` elements apart) to contiguous T.
template <class T> __attribute__((noinline)) void load_row(int64_t code, const void* source, int64_t stride, int64_t count, T* out) {
  if (code == kFloat32) {
    const float* p = static_cast<const float*>(source);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i * stride]);
  } else if (code == kFloat64) {
    const double* p = static_cast<const double*>(source);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(p[i * stride]);
  } else if (code == kBFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(bfloat16_to_float(p[i * stride]));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(float16_to_float(p[i * stride]));
  }
}

template <class T> __attribute__((noinline)) void store_row(int64_t code, void* target, int64_t count, const T* source) {
  if (code == kFloat32) {
    float* p = static_cast<float*>(target);
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<float>(source[i]);
  } else if (code == kFloat64) {
    double* p = static_cast<double*>(target);
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<double>(source[i]);
  } else if (code == kBFloat16) {
    uint16_t* p = static_cast<uint16_t*>(target);
    for (int64_t i = 0; i < count; ++i) p[i] = float_to_bfloat16(static_cast<float>(source[i]));
  } else {
    uint16_t* p = static_cast<uint16_t*>(target);
    for (int64_t i = 0; i < count; ++i) p[i] = float_to_float16(static_cast<float>(source[i]));
  }
}

// The row itself where it is one of T, otherwise its copy.
template <class T> KSSM_FN const T* contiguous_row(int64_t code, const void* source, int64_t count, T* copy) {
  if (code == code_of<T>()) return static_cast<const T*>(source);
  load_row<T>(code, source, 1, count, copy);
  return copy;
}

// A row of T that whole vectors may be read from, or written to, in its place.
template <class T> KSSM_FN bool whole_vectors(int64_t code, int64_t stride, int64_t count) {
  return code == code_of<T>() && stride == 1 && count % kLanes<T> == 0;
}

// A row to be read in whole vectors: itself if it can be, otherwise its copy.
template <class T>
KSSM_FN const T* whole_row(int64_t code, const void* source, int64_t stride, int64_t count, T* copy) {
  if (whole_vectors<T>(code, stride, count)) return static_cast<const T*>(source);
  load_row<T>(code, source, stride, count, copy);
  return copy;
}

KSSM_FN const void* element(const void* base, int64_t code, int64_t index) {
  return static_cast<const char*>(base) + index * dtype_size(code);
}
KSSM_FN void* element(void* base, int64_t code, int64_t index) { return static_cast<char*>(base) + index * dtype_size(code); }

// The C library maps and unmaps large blocks at each call, and their first touch, 4 KiB at a time, took as long as the
// arithmetic: 41,000 page faults for four million oscillators and ten steps. Huge pages are touched 512 times less often.
inline void* allocate(int64_t bytes) {
  constexpr int64_t kHugePage = 2 << 20;
  if (bytes < 2 * kHugePage) return aligned_alloc(64, static_cast<size_t>(bytes));
  const size_t size = static_cast<size_t>((bytes + kHugePage - 1) / kHugePage * kHugePage);
  void* const memory = aligned_alloc(static_cast<size_t>(kHugePage), size);
#if defined(MADV_HUGEPAGE)
  if (memory) madvise(memory, size, MADV_HUGEPAGE);  // a hint; without it all works, slower
#endif
  return memory;
}

// The same for an output that torch has just allocated: the whole huge pages in it, if it is a large one.
inline void expect_writes(int64_t address, int64_t bytes) {
  constexpr int64_t kHugePage = 2 << 20;
  if (!address || bytes < 2 * kHugePage) return;
#if defined(MADV_HUGEPAGE)
  const int64_t first = (address + kHugePage - 1) / kHugePage * kHugePage, last = (address + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(pointer(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#endif
}

// Aligned scratch memory of one scope, up to 256 bytes of it in place: on tiny problems the allocations are most of what
// a kernel costs. Clears `ok`, which threads share, if there is none; a count of 0 takes none.
template <class T> class Buffer {
 public:
  Buffer(int64_t count, bool& ok) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    if (count <= 0) return;
    void* const memory = bytes <= kInPlace ? in_place_ : allocate(bytes);
    memory_ = static_cast<T*>(memory);
    if (!memory_) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (static_cast<void*>(memory_) != in_place_) free(memory_);
  }
  operator T*() const { return memory_; }

 private:
  static constexpr int64_t kInPlace = 256;
  T* memory_ = nullptr;
  alignas(64) unsigned char in_place_[kInPlace];
};

KSSM_FN bool failed(const bool& ok) { return !__atomic_load_n(&ok, __ATOMIC_RELAXED); }

template <class T> KSSM_FN int64_t padded(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

template <class T> KSSM_FN void zero(T* row, int64_t n) {
  for (int64_t j = 0; j < padded<T>(n); j += kLanes<T>) store(row + j, Vec<T>{});
}

// Scratch for a row of n: vectors that reach past its end read zeros there.
template <class T> class RowBuffer : public Buffer<T> {
 public:
  RowBuffer(int64_t n, bool& ok) : Buffer<T>(padded<T>(n), ok) {
    if (T* memory = *this) store(memory + padded<T>(n) - kLanes<T>, Vec<T>{});
  }
};

// The same for `count` rows of n.
template <class T> class Rows : public Buffer<T> {
 public:
  Rows(int64_t count, int64_t n, bool& ok) : Buffer<T>(count * padded<T>(n), ok), stride_(padded<T>(n)) {
    if (T* memory = *this)
      for (int64_t i = 1; i <= count; ++i) store(memory + i * stride_ - kLanes<T>, Vec<T>{});
  }
  T* operator[](int64_t i) const { return static_cast<T*>(*this) + i * stride_; }

 private:
  const int64_t stride_;
};

KSSM_NAMESPACE_END
