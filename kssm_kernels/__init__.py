"""Fused kernels for oscillator networks in PyTorch.

Ops: :func:`order_parameters`, :func:`kuramoto_update`, :func:`kuramoto_features`, :func:`bistable_coupling`,
:func:`oscillator_scan`, :func:`oscillator_step`.
Modules: :class:`FusedKuramoto`, :class:`FusedKuramotoV1`, :class:`FusedKuramotoV2`,
:class:`OscillatorBank`.
"""

from kssm_kernels._version import __version__
from kssm_kernels.backends import available_backends, build_info, explain, use_backend
from kssm_kernels.nn import FusedKuramoto, FusedKuramotoV1, FusedKuramotoV2, OscillatorBank
from kssm_kernels.noise import philox_normal
from kssm_kernels.ops.bistable_coupling import bistable_coupling
from kssm_kernels.ops.kuramoto import kuramoto_features, kuramoto_update
from kssm_kernels.ops.order_parameters import order_parameters
from kssm_kernels.ops.oscillator_scan import oscillator_scan, oscillator_step

__all__ = [
    "FusedKuramoto",
    "FusedKuramotoV1",
    "FusedKuramotoV2",
    "OscillatorBank",
    "__version__",
    "available_backends",
    "bistable_coupling",
    "build_info",
    "explain",
    "kuramoto_features",
    "kuramoto_update",
    "order_parameters",
    "oscillator_scan",
    "oscillator_step",
    "philox_normal",
    "use_backend",
]
