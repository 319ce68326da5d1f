// Declarations of this instruction set's entry points, for the table in kernels.cpp. `watch` is for signals, if the call is
// long.
#pragma once

#include "../math/number.h"
#include "kernels.h"

KSSM_NAMESPACE_BEGIN

#define KSSM_DECLARE(name, Call) bool name(const Call& call, int threads, Watch* watch);
KSSM_CPU_CALLS(KSSM_DECLARE)
#undef KSSM_DECLARE
void arithmetic_floor(int64_t vectors, int harmonics, int threads);
void scan_floor(int64_t vectors, bool moebius, bool backward, int threads);

KSSM_NAMESPACE_END
