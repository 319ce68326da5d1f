// The sign-split EMA step on a list of tensors, in one pass over memory.
// Equations: kssm_kernels/optim/sign_split/__init__.py.

#include "entry_points.h"
#include "parallel.h"
#include "random_words.h"
#include "sign_split_call.h"

KSSM_NAMESPACE_BEGIN
#if defined(__AVX512F__)
KSSM_FN VecF larger(VecF x, VecF y) { return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y); }
KSSM_FN VecD larger(VecD x, VecD y) { return (VecD)_mm512_maskz_max_pd(0xff, (__m512d)x, (__m512d)y); }
KSSM_FN VecF smaller(VecF x, VecF y) { return (VecF)_mm512_maskz_min_ps(0xffff, (__m512)x, (__m512)y); }
KSSM_FN VecD smaller(VecD x, VecD y) { return (VecD)_mm512_maskz_min_pd(0xff, (__m512d)x, (__m512d)y); }
#elif defined(__AVX2__)
KSSM_FN VecF larger(VecF x, VecF y) { return (VecF)_mm256_max_ps((__m256)x, (__m256)y); }
KSSM_FN VecD larger(VecD x, VecD y) { return (VecD)_mm256_max_pd((__m256d)x, (__m256d)y); }
KSSM_FN VecF smaller(VecF x, VecF y) { return (VecF)_mm256_min_ps((__m256)x, (__m256)y); }
KSSM_FN VecD smaller(VecD x, VecD y) { return (VecD)_mm256_min_pd((__m256d)x, (__m256d)y); }
#else
KSSM_FN VecF larger(VecF x, VecF y) { return x > y ? x : y; }
KSSM_FN VecD larger(VecD x, VecD y) { return x > y ? x : y; }
KSSM_FN VecF smaller(VecF x, VecF y) { return x < y ? x : y; }
KSSM_FN VecD smaller(VecD x, VecD y) { return x < y ? x : y; }
#endif
KSSM_FN VecF truncated(VecF x) { return __builtin_convertvector(__builtin_convertvector(x, VecI), VecF); }
KSSM_NAMESPACE_END

// after the functions on vectors that these look up
#include "../math/sign_split.h"
#include "../math/state_rounding.h"

KSSM_NAMESPACE_BEGIN

template <> struct Unsigned<VecF> { using Type = VecU; };
template <> struct Unsigned<VecD> { using Type = VecUL; };

namespace {

constexpr int64_t kStretch = 256;    // elements computed at a time; a block of the 8-bit states
constexpr int64_t kChunk = 1 << 14;  // elements of neighbouring tensors that a thread takes together, at least
constexpr int64_t kChunksAtOnce = 16;  // that it takes at a time, at most: the longer, the better memory is read ahead

// A stretch of one tensor; spans of small tensors go to a thread together.
struct Span {
  int64_t tensor, begin, count;
};

constexpr DynamicMap dynamic_map;

template <class T> struct Stretch {
  T p[kStretch], before[kStretch], g[kStretch], positive[kStretch], negative[kStretch], temperature[kStretch];
  T step[kStretch];
  uint32_t words[kStretch + 127];
};

// Vectors of T from memory of T, or of bfloat16, rounded to nearest.
template <class T> KSSM_FN Vec<T> load_as(const T* p) { return load(p); }
template <class T> KSSM_FN void store_as(T* p, Vec<T> v) { store(p, v); }
typedef uint16_t VecB __attribute__((vector_size(kBytes / 2)));
#if defined(__AVX512BW__)
// gcc 12 widens and narrows these in halves, four instructions for one
KSSM_FN VecU widened(VecB h) { return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); }
KSSM_FN VecB narrowed(VecU u) { return (VecB)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u); }
#else
KSSM_FN VecU widened(VecB h) { return __builtin_convertvector(h, VecU); }
KSSM_FN VecB narrowed(VecU u) { return __builtin_convertvector(u, VecB); }
#endif
KSSM_FN VecF load_as(const uint16_t* p) {
  VecB h;
  __builtin_memcpy(&h, p, sizeof(h));
  return (VecF)(widened(h) << 16);
}
KSSM_FN VecU rounded(VecF v) {  // as float_to_bfloat16
  const VecU u = (VecU)v, odd = u & 0x10000u;
  return (u + (VecU)(odd == 0 ? VecI{} + 0x7fff : VecI{} + 0x8000)) >> 16;
}
KSSM_FN void store_as(uint16_t* p, VecF v) {
  const VecB h = narrowed((VecU)(v == v ? (VecI)rounded(v) : VecI{} + 0x7fc0));
  __builtin_memcpy(p, &h, sizeof(h));
}
template <class T> KSSM_FN void store_mean(T* p, Vec<T> v) { store(p, v); }
KSSM_FN void store_mean(uint16_t* p, VecF v) {  // no mean is NaN
  const VecB h = narrowed(rounded(v));
  __builtin_memcpy(p, &h, sizeof(h));
}

// step null: one for all
template <class T> struct Streams {
  void *p, *positive, *negative;
  const void* g;
  T* temperature;
  const T* step;
};

// P, S: what parameters and gradients, and the two means, lie in memory as.
template <int MODE, bool TEMPERATURE, class P, class S, class T>
double step_stretch(const SignSplitRule<T>& shared, T resistance, T one_step, const Streams<T>& s, int64_t count) {
  using V = Vec<T>;
  const SignSplitRule<T> rule = shared;  // a copy, which the stores below cannot be suspected to change
  V squares{};
  const V strength = splat<V>(resistance), common = splat<V>(one_step);
  P* const p = static_cast<P*>(s.p);
  const P* const g = static_cast<const P*>(s.g);
  const T* const steps = s.step;
  T* const temperature = s.temperature;
  S *const positive = static_cast<S*>(s.positive), *const negative = static_cast<S*>(s.negative);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    if (sizeof(S) == 2) {  // worth 6 % here; with float means, where memory alone is the limit, nothing
      constexpr int64_t kAhead = 1024 / sizeof(T);
      __builtin_prefetch(p + i + kAhead, 1);
      __builtin_prefetch(g + i + kAhead);
      __builtin_prefetch(positive + i + kAhead, 1);
      __builtin_prefetch(negative + i + kAhead, 1);
    }
    SignSplitElement<V> x{load_as(p + i), load_as(positive + i), load_as(negative + i), V{}};
    if (TEMPERATURE) x.temperature = load(temperature + i);
    const V size =
        sign_split_step<MODE, TEMPERATURE, V>(rule, strength, steps ? load(steps + i) : common, load_as(g + i), x);
    if (MODE == kConsolidate) squares = squares + size * size;
    store_as(p + i, x.p);
    store_mean(positive + i, x.positive);
    store_mean(negative + i, x.negative);
    if (TEMPERATURE) store(temperature + i, x.temperature);
  }
  return MODE == kConsolidate ? static_cast<double>(lane_sum<T>(squares)) : 0.0;
}

template <class T> using StepStretch = double (*)(const SignSplitRule<T>&, T, T, const Streams<T>&, int64_t);

template <class P, class S, class T> StepStretch<T> chosen(int mode, bool temperature) {
  switch (2 * mode + temperature) {
    case 2 * kPaper: return step_stretch<kPaper, false, P, S, T>;
    case 2 * kPaper + 1: return step_stretch<kPaper, true, P, S, T>;
    case 2 * kNormalized: return step_stretch<kNormalized, false, P, S, T>;
    case 2 * kNormalized + 1: return step_stretch<kNormalized, true, P, S, T>;
    case 2 * kConsolidate: return step_stretch<kConsolidate, false, P, S, T>;
    default: return step_stretch<kConsolidate, true, P, S, T>;
  }
}

// The one for arrays of T, and those for bfloat16 in place: float only, no other dtype has 16-bit storage.
template <class T> struct Steps {
  StepStretch<T> of[2][2];  // [parameters in bfloat16][means in bfloat16]
  Steps(int mode, bool temperature) { of[0][0] = of[0][1] = of[1][0] = of[1][1] = chosen<T, T, T>(mode, temperature); }
};
template <> inline Steps<float>::Steps(int mode, bool temperature)
    : of{{chosen<float, float, float>(mode, temperature), chosen<float, uint16_t, float>(mode, temperature)},
         {chosen<uint16_t, float, float>(mode, temperature), chosen<uint16_t, uint16_t, float>(mode, temperature)}} {}

KSSM_FN int64_t state_size(int64_t code) { return code == kDynamic8 ? 1 : dtype_size(code); }
KSSM_FN void* state_element(void* base, int64_t code, int64_t i) { return static_cast<char*>(base) + i * state_size(code); }

template <class T> class Stepper {
 public:
  explicit Stepper(const SignSplitCall& call) : call_(call), steps_(call.mode, call.temperature) {
    const bool single = code_of<T>() == kFloat32;
    param16_ = single && call.param_code == kBFloat16 && call.grad_code == kBFloat16 && !call.stochastic_param && !call.kahan;
    state16_ = single && call.state_code == kBFloat16 && !call.stochastic_state;
    in_place_ = (param16_ || (call.param_code == code_of<T>() && call.grad_code == code_of<T>())) &&
                (state16_ || call.state_code == code_of<T>()) && !call.stochastic_param && !call.stochastic_state;
    rule_ = {static_cast<T>(call.beta), static_cast<T>(1.0 - call.beta), static_cast<T>(call.kappa),
             static_cast<T>(call.eps), static_cast<T>(call.decay), static_cast<T>(call.cool),
             static_cast<T>(call.heat), static_cast<T>(call.floor), static_cast<T>(1.0 - call.floor),
             static_cast<T>(call.maximize ? -call.scale : call.scale), call.maximize || call.scale != 1.0,
             call.eps != 0.0, call.decay != 0.0, call.lazy};
    one_step_ = static_cast<T>(call.lr) / static_cast<T>(call.cryo);
  }

  // Returns the sum of (P + N)^2 where the mode needs it.
  double span(const Span& span, Stretch<T>& work) const {
    const TensorAt t(call_.tensors[span.tensor]);
    const T rms = t.rms ? static_cast<T>(*t.rms) : T(0);
    const T resistance = call_.mode != kConsolidate ? rule_.kappa : rms > T(0) ? rule_.kappa / rms : T(0);
    // Without a buffer between there is no need to stop, but for the sum of float squares.
    const bool in_place = in_place_ && !t.cryo && call_.mode != kConsolidate && span.count >= kStretch;
    const int64_t most = in_place ? span.count / kStretch * kStretch : kStretch;
    double sum = 0.0;
    for (int64_t done = 0; done < span.count;) {
      const int64_t left = span.count - done, count = left < most ? left : most;
      sum += stretch(t, resistance, span.begin + done, count, work);
      done += count;
    }
    return sum;
  }

 private:
  double stretch(const TensorAt& t, T resistance, int64_t begin, int64_t count, Stretch<T>& work) const {
    const bool whole = count % kLanes<T> == 0;
    const bool param16 = whole && param16_, state16 = whole && state16_;
    const bool direct = param16 || (whole && call_.param_code == code_of<T>());
    const bool direct_states = state16 || (whole && call_.state_code == code_of<T>());
    const bool direct_gradient = param16 || (whole && call_.grad_code == code_of<T>());
    const int64_t block = begin / kStretch;
    void* const p = element(t.p, call_.param_code, begin);
    const void* const g = element(t.g, call_.grad_code, begin);
    void* const positive = state_element(t.positive, call_.state_code, begin);
    void* const negative = state_element(t.negative, call_.state_code, begin);
    T* const temperature = t.temperature ? static_cast<T*>(t.temperature) + begin : nullptr;
    if (!direct) read(call_.param_code, p, count, work.p);
    if (t.compensation) add_compensation(t, begin, count, work);
    if (!direct_gradient) read(call_.grad_code, g, count, work.g);
    if (!direct_states) {
      read_state(positive, t.positive_scale, block, count, work.positive);
      read_state(negative, t.negative_scale, block, count, work.negative);
    }
    if (temperature && !whole) read(code_of<T>(), temperature, count, work.temperature);
    if (call_.stochastic_state || call_.stochastic_param) fill_words(t.stream, *t.step, call_.seed, begin, count, work.words);
    const Streams<T> s = {direct ? p : work.p,
                          direct_states ? positive : work.positive,
                          direct_states ? negative : work.negative,
                          direct_gradient ? g : work.g,
                          whole ? temperature : work.temperature,
                          t.cryo ? row_steps(t, begin, count, work.step) : nullptr};

    const double sum = steps_.of[param16][state16](rule_, resistance, one_step_, s, padded<T>(count));

    if (!direct) write_parameter(t, p, begin, count, work);
    if (!direct_states) {
      write_state(positive, t.positive_scale, block, count, work.positive, work.words,
                  [](uint32_t w) { return bits_for_positive(w); });
      write_state(negative, t.negative_scale, block, count, work.negative, work.words,
                  [](uint32_t w) { return bits_for_negative(w); });
    }
    if (temperature && !whole) store_row<T>(code_of<T>(), temperature, count, work.temperature);
    return sum;
  }

  // Zeros behind the end: a gradient of zero there adds nothing to the sum of squares.
  static void read(int64_t code, const void* from, int64_t count, T* to) {
    load_row<T>(code, from, 1, count, to);
    for (int64_t i = count; i < padded<T>(count); ++i) to[i] = T(0);
  }

  void read_state(const void* from, const float* scale, int64_t block, int64_t count, T* to) const {
    if (call_.state_code != kDynamic8) return read(call_.state_code, from, count, to);
    const uint8_t* codes = static_cast<const uint8_t*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(dynamic_map.value[codes[i]] * scale[block]);
    for (int64_t i = count; i < padded<T>(count); ++i) to[i] = T(0);
  }

  template <class Bits>
  void write_state(void* to, float* scale, int64_t block, int64_t count, const T* from, const uint32_t* words,
                   Bits random) const {
    if (call_.state_code == kDynamic8) {
      write_codes(static_cast<uint8_t*>(to), scale[block], count, from, words, random);
    } else if (call_.stochastic_state && call_.state_code == kBFloat16) {
      uint16_t* target = static_cast<uint16_t*>(to);
      for (int64_t i = 0; i < count; ++i) target[i] = stochastic_bfloat16(static_cast<float>(from[i]), random(words[i]));
    } else {
      store_row<T>(call_.state_code, to, count, from);
    }
  }

  // Reads up to the next whole vector, as read_state wrote it.
  template <class Bits>
  void write_codes(uint8_t* to, float& scale, int64_t count, const T* from, const uint32_t* words, Bits random) const {
    float x[kStretch], offset[kStretch];
    for (int64_t i = 0; i < padded<T>(count); ++i) x[i] = static_cast<float>(from[i]);
    for (int64_t i = padded<T>(count); i < padded<float>(count); ++i) x[i] = 0.0f;
    for (int64_t i = 0; i < count; ++i)
      offset[i] = call_.stochastic_state ? static_cast<float>(random(words[i])) * 0x1p-16f : 0.5f;
    for (int64_t i = count; i < padded<float>(count); ++i) offset[i] = 0.0f;
    VecF tops{};
    for (int64_t i = 0; i < count; i += kLanes<float>) tops = load(x + i) > tops ? load(x + i) : tops;
    float top = 0.0f;
    for (int i = 0; i < kLanes<float>; ++i) top = tops[i] > top ? tops[i] : top;
    scale = top;
    const VecF over = splat<VecF>(top > 0.0f ? top : 1.0f);
    for (int64_t i = 0; i < count; i += kLanes<float>)
      store(x + i, dynamic_code<VecF>(load(x + i) / over, load(offset + i)));
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>(x[i]));
  }

  static void add_compensation(const TensorAt& t, int64_t begin, int64_t count, Stretch<T>& work) {
    const uint16_t* lost = static_cast<const uint16_t*>(t.compensation) + begin;
    for (int64_t i = 0; i < count; ++i)
      work.before[i] = work.p[i] = work.p[i] + static_cast<T>(bfloat16_to_float(lost[i]));
  }

  void write_parameter(const TensorAt& t, void* to, int64_t begin, int64_t count, Stretch<T>& work) const {
    if (t.compensation) {
      uint16_t* target = static_cast<uint16_t*>(to);
      uint16_t* lost = static_cast<uint16_t*>(t.compensation) + begin;
      for (int64_t i = 0; i < count; ++i) {
        if (work.p[i] == work.before[i]) continue;  // what did not move stays as it is, in its last bit too
        const float x = static_cast<float>(work.p[i]);
        target[i] = float_to_bfloat16(x);
        lost[i] = float_to_bfloat16(x - bfloat16_to_float(target[i]));
      }
    } else if (call_.stochastic_param && call_.param_code == kBFloat16) {
      uint16_t* target = static_cast<uint16_t*>(to);
      for (int64_t i = 0; i < count; ++i)
        target[i] = stochastic_bfloat16(static_cast<float>(work.p[i]), bits_for_parameter(work.words[i]));
    } else {
      store_row<T>(call_.param_code, to, count, work.p);
    }
  }

  const T* row_steps(const TensorAt& t, int64_t begin, int64_t count, T* out) const {
    for (int64_t i = 0; i < count;) {
      const int64_t row = (begin + i) / t.row, end = (row + 1) * t.row - begin, last = end < count ? end : count;
      const T step = one_step_ / static_cast<T>(t.cryo[row]);
      for (; i < last; ++i) out[i] = step;
    }
    for (int64_t i = count; i < padded<T>(count); ++i) out[i] = T(0);
    return out;
  }

  const SignSplitCall& call_;
  const Steps<T> steps_;
  bool param16_, state16_, in_place_;
  SignSplitRule<T> rule_;
  T one_step_;
};

template <class T> bool run(const SignSplitCall& call) {
  int64_t spans = 0, total = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    spans += (call.tensors[i].n + kChunk - 1) / kChunk;
    total += call.tensors[i].n;
  }
  bool ok = true;
  Buffer<Span> list(spans, ok);
  Buffer<int64_t> first(spans + 1, ok);  // span that a chunk begins with
  Buffer<double> sums(spans, ok);
  if (failed(ok)) return false;
  int64_t chunks = 0, filled = kChunk, s = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    for (int64_t begin = 0; begin < call.tensors[i].n; begin += kChunk) {
      const int64_t left = call.tensors[i].n - begin, count = left < kChunk ? left : kChunk;
      if (filled + count > kChunk) {
        first[chunks++] = s;
        filled = 0;
      }
      filled += count;
      list[s++] = {i, begin, count};
    }
  }
  first[chunks] = s;
  const Stepper<T> stepper(call);
  const double work = static_cast<double>(total) / kLanes<T> * 20.0;
  const int threads = worth_threads(work, call.threads);
  const int64_t share = chunks / (8 * int64_t(threads));
  const int64_t together = share < 1 ? 1 : share < kChunksAtOnce ? share : kChunksAtOnce;
  parallel_for((chunks + together - 1) / together, threads, [&](int64_t task) {
    Stretch<T> own;
    const int64_t begin = task * together, end = begin + together < chunks ? begin + together : chunks;
    for (int64_t i = first[begin]; i < first[end]; ++i) sums[i] = stepper.span(list[i], own);
  });
  if (call.mode != kConsolidate) return true;
  s = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    double sum = 0.0;
    for (int64_t begin = 0; begin < call.tensors[i].n; begin += kChunk) sum += sums[s++];
    if (call.tensors[i].n)
      *TensorAt(call.tensors[i]).rms = static_cast<float>(__builtin_sqrt(sum / static_cast<double>(call.tensors[i].n)));
  }
  return true;
}

}  // namespace

bool sign_split(const SignSplit& packed, int threads, Watch*) {
  const SignSplitCall call(packed, threads);
  return call.param_code == kFloat64 ? run<double>(call) : run<float>(call);
}

KSSM_NAMESPACE_END
