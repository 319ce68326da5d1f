// A block of the oscillator scan: some heads of one row, their oscillators in the lanes of a few vectors.
//
// A vector has W lanes. A head of N <= W oscillators has the next power of two of them, so that whole heads share a
// vector and a sum over a head is a few exchanges of lanes. A larger head has whole vectors, and a block of its own.
// Lanes without an oscillator hold zeros. Bits do not depend on the block that a head is in.
#pragma once

#include <utility>

#include "memory.h"
#include "parallel.h"
#include "transpose.h"

KSSM_NAMESPACE_BEGIN

// Lane i gets lane i xor K.
#if defined(__clang__) || __GNUC__ >= 12
template <int K, class V, int... I> KSSM_FN V exchanged(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ K)...);
}
template <int K, class V> KSSM_FN V exchanged(V x) {
  return exchanged<K>(x, std::make_integer_sequence<int, sizeof(V) / sizeof(Scalar<V>)>{});
}
#else
template <int K, class V> KSSM_FN V exchanged(V x) {
  V y;
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(Scalar<V>)); ++i) y[i] = x[i ^ K];
  return y;
}
#endif

// In every lane the sum over the `group` lanes, a power of two, that it is one of; the same bits in each of them.
template <int K = 1, class V> KSSM_FN V group_sum(V x, int64_t group) {
  if constexpr (K < static_cast<int>(sizeof(V) / sizeof(Scalar<V>))) {
    if (K < group) return group_sum<2 * K>(x + exchanged<K>(x), group);
  }
  return x;
}

// How heads lie in lanes.
template <class T> struct Grid {
  static constexpr int64_t W = kLanes<T>;

  explicit Grid(int64_t oscillators) : n(oscillators), group(1) {
    if (n > W) group = padded<T>(n);
    else
      while (group < n) group *= 2;
  }
  bool joint() const { return group > W; }  // a head of several vectors
  // Heads in a block of up to `vectors` vectors.
  int64_t heads_in(int64_t vectors) const { return joint() ? 1 : vectors * W / group; }

  int64_t n, group;
};

template <class T> class Block {
 public:
  static constexpr int64_t W = kLanes<T>;

  Block(const Grid<T>& own, int64_t own_row, int64_t head, int64_t count)
      : grid(own), row(own_row), first(head), heads(count), lanes(padded<T>(count * own.group)),
        whole_(own.n == own.group && count * own.group == lanes) {}

  int64_t columns() const { return heads * grid.n; }

  // This block's columns of a row of memory, in lanes: where they lie, or in `copy`, whose other lanes stay zero.
  const T* in_lanes(int64_t code, const void* source, T* copy) const {
    if (whole_ && code == code_of<T>()) return static_cast<const T*>(source);
    copy_in(code, source, copy);
    return copy;
  }
  void copy_in(int64_t code, const void* source, T* copy) const {
    if (whole_ && code == code_of<T>()) return copy_lanes(static_cast<const T*>(source), copy);
    if (grid.n == grid.group) return load_row(code, source, 1, columns(), copy);
    for (int64_t h = 0; h < heads; ++h)
      load_row(code, element(source, code, h * grid.n), 1, grid.n, copy + h * grid.group);
  }
  void copy_out(int64_t code, const T* source, void* target) const {
    if (whole_ && code == code_of<T>()) return copy_lanes(source, static_cast<T*>(target));
    if (grid.n == grid.group) return store_row(code, target, columns(), source);
    for (int64_t h = 0; h < heads; ++h)
      store_row(code, element(target, code, h * grid.n), grid.n, source + h * grid.group);
  }
  // The row itself, where lanes can be written to it, or null.
  T* lanes_at(int64_t code, void* target) const {
    return whole_ && code == code_of<T>() ? static_cast<T*>(target) : nullptr;
  }

  // The vector at lane `o` of heads' values, each in all lanes of its head; reads up to W values behind the last.
  KSSM_FN Vec<T> spread(const T* values, int64_t o) const {
    if (grid.joint()) return splat<Vec<T>>(values[o / grid.group]);
    Vec<T> x = load(values + o / grid.group);
    for (int64_t g = 1; g < grid.group; g *= 2) x = interleaved<false>(x, x);
    return x;
  }
  void expand(const T* values, T* out) const {
    for (int64_t o = 0; o < lanes; o += W) store(out + o, spread(values, o));
  }
  // Zero in lanes without an oscillator.
  void only_live(T* out) const {
    if (whole_) return;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = grid.n; j < grid.group; ++j) out[h * grid.group + j] = T(0);
    for (int64_t j = heads * grid.group; j < lanes; ++j) out[j] = T(0);
  }
  // The sum over each head in all of its lanes, times `factor`.
  void head_sums(const T* x, T factor, T* out) const {
    if (!grid.joint()) {
      for (int64_t o = 0; o < lanes; o += W) store(out + o, splat<Vec<T>>(factor) * group_sum(load(x + o), grid.group));
      return;
    }
    for (int64_t begin = 0; begin < lanes; begin += grid.group) {
      Vec<T> sum = load(x + begin);
      for (int64_t o = begin + W; o < begin + grid.group; o += W) sum = sum + load(x + o);
      sum = splat<Vec<T>>(factor) * group_sum(sum, W);
      for (int64_t o = begin; o < begin + grid.group; o += W) store(out + o, sum);
    }
  }

  bool whole() const { return whole_; }

  const Grid<T>& grid;
  const int64_t row, first, heads, lanes;

 private:
  KSSM_FN void copy_lanes(const T* source, T* target) const {
    for (int64_t o = 0; o < lanes; o += W) store(target + o, load(source + o));
  }

  const bool whole_;  // every lane has an oscillator
};

// Scratch memory of one block, cut into rows of whole vectors. All of it is zero at first where lanes have no oscillator:
// nothing else writes those.
template <class T> class Arena {
 public:
  Arena(int64_t count, const Block<T>& block, bool& ok)
      : memory_(padded<T>(count), ok), next_(memory_), left_(padded<T>(count)) {
    if (next_ && !block.whole()) zero(next_, count);
  }
  T* take(int64_t count) {
    T* const taken = next_;
    next_ += padded<T>(count);
    left_ -= padded<T>(count);
    if (left_ < 0) __builtin_trap();  // the room was counted wrong
    return taken;
  }
  T* zeros(int64_t count) {
    T* const taken = take(count);
    zero(taken, count);
    return taken;
  }

 private:
  Buffer<T> memory_;
  T* next_;
  int64_t left_;
};

KSSM_NAMESPACE_END
