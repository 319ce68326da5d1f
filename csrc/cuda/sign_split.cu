// The sign-split EMA step on a list of tensors, in one pass over memory.
// Equations: kssm_kernels/optim/sign_split/__init__.py.
//
// A warp steps one chunk of one tensor, so that a block serves a part of a large tensor or several small ones alike;
// there is no barrier. Which chunk is whose a warp finds by bisection in the numbers of the tensors' first chunks: a
// few loads from the cache, where a list of all chunks would come from memory. Addresses travel to the device in the
// parameters of launches (upload), which neither wait nor read the host's memory later: a captured step keeps them.

#include "sign_split.h"

KSSM_NAMESPACE_BEGIN

namespace {

constexpr int64_t kChunk = 512;  // elements of a warp, as in kssm_kernels/optim/sign_split/_cuda.py
constexpr int kSumThreads = 256, kSumsAtOnce = 16;
constexpr int kWords = 496;  // of an upload: with its other fields below the 4 KiB of parameters that a launch may have

struct Words {
  int64_t word[kWords];
};

// A number of the call, or one that a tensor on the device holds.
template <class T> struct Given {
  T value;
  int64_t address, code;

  KSSM_DEVICE T get() const { return address ? load_any<T>(code, address, 0) : value; }
};

template <class T> struct Arguments {
  SignSplitRule<T> rule;
  Given<T> lr, scale;
  Given<float> found_inf;
  T cryo;
  const SignSplitTensor* tensors;
  const int64_t *gradients, *first;
  int64_t count, chunks, grad_code, state_code;
  int mode;
  bool maximize, temperature, stochastic_param, stochastic_state, kahan;
  uint64_t seed;
  double* sums;
};

__global__ void __launch_bounds__(kThreads) upload_words(Words words, int64_t count, int64_t* to) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = words.word[i];
}

// The last tensor whose first chunk is not behind this one: those without elements have none.
KSSM_DEVICE int64_t tensor_of(int64_t chunk, const int64_t* first, int64_t count) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first[middle] <= chunk) low = middle;
    else high = middle;
  }
  return low;
}

template <class T, int V> struct Run {
  T p[V], g[V], positive[V], negative[V], temperature[V], step[V];
};

// Returns the sum of (P + N)^2.
template <int MODE, bool TEMPERATURE, class T, int V>
KSSM_DEVICE T advance(const SignSplitRule<T>& rule, T resistance, Run<T, V>& run) {
  T squares = T(0);
  KSSM_UNROLL
  for (int v = 0; v < V; ++v) {
    SignSplitElement<T> x{run.p[v], run.positive[v], run.negative[v], TEMPERATURE ? run.temperature[v] : T(0)};
    const T size = sign_split_step<MODE, TEMPERATURE, T>(rule, resistance, run.step[v], run.g[v], x);
    run.p[v] = x.p;
    run.positive[v] = x.positive;
    run.negative[v] = x.negative;
    if (TEMPERATURE) run.temperature[v] = x.temperature;
    if (MODE == kConsolidate) squares += size * size;
  }
  return squares;
}

template <class T, int V>
KSSM_DEVICE T advance(const SignSplitRule<T>& rule, int mode, bool temperature, T resistance, Run<T, V>& run) {
  switch (2 * mode + temperature) {
    case 2 * kPaper: return advance<kPaper, false>(rule, resistance, run);
    case 2 * kPaper + 1: return advance<kPaper, true>(rule, resistance, run);
    case 2 * kNormalized: return advance<kNormalized, false>(rule, resistance, run);
    case 2 * kNormalized + 1: return advance<kNormalized, true>(rule, resistance, run);
    case 2 * kConsolidate: return advance<kConsolidate, false>(rule, resistance, run);
    default: return advance<kConsolidate, true>(rule, resistance, run);
  }
}

// lr / cryo of each element: a division of integers for the first one's row, and one of numbers for each row.
template <class T, int V>
KSSM_DEVICE void row_steps(const SignSplitTensor& t, T one_step, int64_t i, int64_t left, T (&step)[V]) {
  int64_t row = i / t.row, place = i - row * t.row;
  T here = T(0);
  KSSM_UNROLL
  for (int v = 0; v < V; ++v) {
    if (v && ++place == t.row) {
      ++row;
      place = 0;
    }
    if ((v == 0 || place == 0) && v < left) here = one_step / static_cast<T>(load(element<const float>(t.cryo, row)));
    step[v] = here;
  }
}

// What a thread steps at once, and where it lies.
template <class P, class S, bool PLAIN> struct Work {
  using T = Compute<P>;
  static constexpr int V = kRun<P, S>;
  static constexpr bool low_precision = !PLAIN && kCode<P> == kBFloat16;

  KSSM_DEVICE Work(const Arguments<T>& arguments, const SignSplitTensor& tensor, int64_t gradient_at, int64_t first)
      : a(arguments), t(tensor), gradient(gradient_at), i(first), left(tensor.n - first),
        kahan(low_precision && a.kahan), random_param(low_precision && a.stochastic_param),
        random_means(!PLAIN && a.stochastic_state), temperature(!PLAIN && a.temperature),
        positive{t.positive, t.positive_scale, PLAIN ? kCode<S> : a.state_code, i, left, random_means},
        negative{t.negative, t.negative_scale, positive.code, i, left, random_means} {}

  template <bool WHOLE> KSSM_DEVICE void read() {
    load_elements<WHOLE, P>(kCode<P>, t.p, i, left, x.p);
    load_elements<WHOLE, P>(PLAIN ? kCode<P> : a.grad_code, gradient, i, left, x.g);
    Means<S>::template read<WHOLE>(positive, x.positive);
    Means<S>::template read<WHOLE>(negative, x.negative);
    if (temperature) load_elements<WHOLE, T>(kCode<T>, t.temperature, i, left, x.temperature);
    if (kahan) load_elements<WHOLE, BFloat16>(kBFloat16, t.compensation, i, left, lost);
  }

  template <bool WHOLE> KSSM_DEVICE void write() {
    store_elements<WHOLE, P>(kCode<P>, t.p, i, left, x.p);
    Means<S>::template write<WHOLE>(positive, x.positive, words, [](uint32_t w) { return bits_for_positive(w); });
    Means<S>::template write<WHOLE>(negative, x.negative, words, [](uint32_t w) { return bits_for_negative(w); });
    if (temperature) store_elements<WHOLE, T>(kCode<T>, t.temperature, i, left, x.temperature);
    if (kahan) store_elements<WHOLE, BFloat16>(kBFloat16, t.compensation, i, left, lost);
  }

  // Returns the sum of (P + N)^2 in consolidate.
  KSSM_DEVICE T step(const SignSplitRule<T>& rule, T resistance, T one_step) {
    T before[V];
    if (kahan) {
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) {
        before[v] = x.p[v];
        x.p[v] = x.p[v] + lost[v];
      }
    }
    if (random_param || random_means) random_words(a.seed, *element<const int64_t>(t.step, 0), t.stream, i, words);
    if (!PLAIN && t.cryo) {
      row_steps(t, one_step, i, left, x.step);
    } else {
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) x.step[v] = one_step;
    }

    const T squares = advance(rule, a.mode, temperature, resistance, x);

    if (kahan) {
      KSSM_UNROLL
      for (int v = 0; v < V; ++v) {  // what did not move stays as it is, in its last bit too
        const bool moved = x.p[v] != before[v] + lost[v];
        const T stored = static_cast<T>(widen(narrow<BFloat16>(static_cast<float>(x.p[v]))));
        lost[v] = moved ? x.p[v] - stored : lost[v];
        x.p[v] = moved ? stored : before[v];
      }
    }
    if (random_param) {
      KSSM_UNROLL
      for (int v = 0; v < V; ++v)
        x.p[v] = static_cast<T>(on_bfloat16(static_cast<float>(x.p[v]), bits_for_parameter(words[v])));
    }
    return squares;
  }

  const Arguments<T>& a;
  const SignSplitTensor& t;
  const int64_t gradient, i, left;
  const bool kahan, random_param, random_means, temperature;
  const MeanRun positive, negative;
  Run<T, V> x{};
  T lost[V] = {};
  uint32_t words[V] = {};
};

// Blocks that a multiprocessor is promised room for, as a limit on registers: without the options fewer do.
template <class P, class S, bool PLAIN> constexpr int kBlocks = (sizeof(Compute<P>) == 8 ? kRegisters255
                                                                 : !PLAIN                ? kRegisters128
                                                                 : kRun<P, S> == 4       ? kRegisters64
                                                                                         : kRegisters96) / kThreads;

// PLAIN: without temperature, cryo per row, random words, Kahan summation and foreign dtypes.
// Fields of the row are read where they are used, from the cache: held in registers they take 28.
template <class P, class S, bool PLAIN>
__global__ void __launch_bounds__(kThreads, kBlocks<P, S, PLAIN>) step(const Arguments<Compute<P>> a) {
  using T = Compute<P>;
  constexpr int V = kRun<P, S>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t chunk = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (chunk >= a.chunks || a.found_inf.get() != 0.0f) return;
  const int64_t number = tensor_of(chunk, a.first, a.count);
  KSSM_COUNT_LOADED(a.tensors + number, sizeof(SignSplitTensor));
  const SignSplitTensor& t = a.tensors[number];
  const int64_t begin = (chunk - a.first[number]) * kChunk, end = begin + kChunk < t.n ? begin + kChunk : t.n;

  SignSplitRule<T> rule = a.rule;
  if (rule.scaled) rule.scale = a.maximize ? -a.scale.get() : a.scale.get();
  const T rms = t.rms ? static_cast<T>(load(element<const float>(t.rms, 0))) : T(0);
  const T resistance = a.mode != kConsolidate ? rule.kappa : rms > T(0) ? rule.kappa / rms : T(0);
  const T one_step = a.lr.get() / a.cryo;
  const int64_t gradient = a.gradients[number];
  const bool aligned =
      ((t.p | gradient | t.positive | t.negative | t.temperature | t.compensation) & (sizeof(uint4) - 1)) == 0;
  T squares = T(0);
  KSSM_ROLLED
  for (int64_t i = begin; i < end; i += kWarp * V) {
    // for the whole warp: loads then follow each other without a branch, all of them on their way at once
    const bool whole = aligned && i + kWarp * V <= t.n;
    Work<P, S, PLAIN> work(a, t, gradient, i + lane * V);
    if (whole) work.template read<true>();
    else work.template read<false>();
    squares += work.step(rule, resistance, one_step);
    if (whole) work.template write<true>();
    else work.template write<false>();
  }
  if (a.mode != kConsolidate) return;
  KSSM_UNROLL
  for (int offset = 1; offset < kWarp; offset *= 2) squares += shuffle_xor(squares, offset);
  if (lane == 0) store(a.sums + chunk, static_cast<double>(squares));
}

// rms of P + N for the next step: a block adds up one tensor's chunks, always in the same order.
__global__ void __launch_bounds__(kSumThreads)
    sum_chunks(const SignSplitTensor* tensors, const int64_t* first, const double* sums, Given<float> found_inf) {
  KSSM_SHARED(shared);
  const int64_t i = blockIdx.x, end = first[i + 1];
  const SignSplitTensor t = tensors[i];
  if (t.n == 0 || found_inf.get() != 0.0f) return;
  double part[kSumsAtOnce] = {};
  for (int64_t c = first[i] + threadIdx.x; c < end; c += kSumThreads * kSumsAtOnce) {
    KSSM_UNROLL
    for (int k = 0; k < kSumsAtOnce; ++k)
      if (c + k * kSumThreads < end) part[k] += load(sums + c + k * kSumThreads);
  }
  double total[1] = {0.0};
  KSSM_UNROLL
  for (int k = 0; k < kSumsAtOnce; ++k) total[0] += part[k];
  int turn = 0;
  team_sum(Team(kSumThreads), total, reinterpret_cast<double*>(shared), turn);
  const double rms = square_root(total[0] / static_cast<double>(t.n));
  if (threadIdx.x == 0) store(element<float>(t.rms, 0), static_cast<float>(rms));
}

template <class T> Arguments<T> arguments_of(const SignSplitDevice& c) {
  const auto number = [](double x) { return static_cast<T>(x); };
  const SignSplitOptions& o = c.options;
  const SignSplitRule<T> rule{number(o.beta), number(1.0 - o.beta), number(o.kappa), number(o.eps), number(o.decay),
                              number(o.cool), number(o.heat), number(o.floor), number(1.0 - o.floor), T(1),
                              o.maximize || c.scale_at || c.scale != 1.0, o.eps != 0.0, o.decay != 0.0, o.lazy != 0};
  return {rule, {number(c.lr), c.lr_at, c.lr_code}, {number(c.scale), c.scale_at, c.scale_code},
          {0.0f, c.found_at, c.found_code}, number(o.cryo), reinterpret_cast<const SignSplitTensor*>(c.tensors),
          reinterpret_cast<const int64_t*>(c.gradients), reinterpret_cast<const int64_t*>(c.first), c.tensor_count,
          c.chunks, o.grad_code, o.state_code, static_cast<int>(o.mode), o.maximize != 0, o.temperature != 0,
          o.stochastic_param != 0, o.stochastic_state != 0, o.kahan != 0, o.seed, reinterpret_cast<double*>(c.sums)};
}

struct RunStep {
  const SignSplitDevice& call;
  void* stream;

  template <class P> int run() const {
    switch (call.options.state_code) {
      case kDynamic8: return with_means<P, Dynamic8>();
      case kBFloat16: return with_means<P, BFloat16>();
      case kFloat32: case kFloat64: case kFloat16: return with_means<P, Compute<P>>();
      default: return kWrongCall;
    }
  }
  template <class P, class S> int with_means() const {
    const Arguments<Compute<P>> a = arguments_of<Compute<P>>(call);
    const int64_t blocks = (call.chunks * kWarp + kThreads - 1) / kThreads;
    const SignSplitOptions& o = call.options;
    const bool own = o.grad_code == o.param_code && o.state_code == kCode<S>;
    const bool options = o.temperature || o.stochastic_param || o.stochastic_state || o.kahan || call.cryo_rows;
    const int error = launch(own && !options ? step<P, S, true> : step<P, S, false>, blocks, kThreads, 0, stream, a);
    if (error || call.options.mode != kConsolidate) return error;
    return launch(sum_chunks, call.tensor_count, kSumThreads, team_sum_bytes<double>(kSumThreads), stream, a.tensors, a.first,
                  static_cast<const double*>(a.sums), a.found_inf);
  }
};

}  // namespace

int upload(const Upload& call, void* stream) {
  for (int64_t done = 0; done < call.words; done += kWords) {
    const int64_t left = call.words - done, count = left < kWords ? left : kWords;
    const int64_t* const from = reinterpret_cast<const int64_t*>(call.source) + done;
    int64_t* const to = reinterpret_cast<int64_t*>(call.target) + done;
    Words words;
    memcpy(words.word, from, static_cast<size_t>(count) * sizeof(int64_t));
    const int error = launch(upload_words, 1, kThreads, 0, stream, words, count, to);
    if (error) return error;
  }
  return 0;
}

int sign_split(const SignSplitDevice& call, void* stream) {
  return with_storage(call.options.param_code, RunStep{call, stream});
}

KSSM_NAMESPACE_END
