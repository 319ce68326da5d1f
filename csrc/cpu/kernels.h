// The kernels of every instruction set: one table each. The calls they take: ../calls.h.
#pragma once

#include "../calls.h"
#include "watch.h"

namespace kssm {

struct Kernels {
  const char* name;
  int vector_bytes;
  void (*arithmetic_floor)(int64_t vectors, int harmonics, int threads);
  void (*scan_floor)(int64_t vectors, bool moebius, bool backward, int threads);
#define KSSM_MEMBER(name, Call) bool (*name)(const Call&, int threads, Watch* watch);
  KSSM_CPU_CALLS(KSSM_MEMBER)
#undef KSSM_MEMBER
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }

}  // namespace kssm
