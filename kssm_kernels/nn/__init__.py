"""Drop-in modules: banks of phase oscillators."""

from kssm_kernels.nn.banks import FusedKuramoto, FusedKuramotoV1, FusedKuramotoV2

__all__ = ["FusedKuramoto", "FusedKuramotoV1", "FusedKuramotoV2"]
