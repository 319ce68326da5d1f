"""Modules: drop-in banks of phase oscillators, and the recurrent bank."""

from kssm_kernels.nn.banks import FusedKuramoto, FusedKuramotoV1, FusedKuramotoV2
from kssm_kernels.nn.scan import OscillatorBank

__all__ = ["FusedKuramoto", "FusedKuramotoV1", "FusedKuramotoV2", "OscillatorBank"]
