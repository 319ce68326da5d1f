// Declarations of this instruction set's entry points, for the table in kernels.cpp.
#pragma once

#include "../math/number.h"
#include "kernels.h"

KSSM_NAMESPACE_BEGIN

bool order_parameters_forward(const PhaseRows& theta, int harmonics, void* features, int threads);
bool order_parameters_backward(const PhaseRows& theta, int harmonics, const void* features, const void* gradient,
                               void* grad_theta, int threads);
bool kuramoto_forward(const KuramotoCall& call, void* features, void* phases);
bool kuramoto_backward(const KuramotoCall& call, const KuramotoSaved& saved, const GradientTarget* targets);
void bistable_forward(const void* params, int64_t rows, int code, double low, double high, void* coupling, void* u,
                      void* delta);
void bistable_backward(const void* params, int64_t rows, int code, double low, double high, const void* g_coupling,
                       const void* g_u, const void* g_delta, void* grad_params);
bool sign_split(const SignSplitCall& call);
void arithmetic_floor(int64_t vectors, int harmonics, int threads);

KSSM_NAMESPACE_END
