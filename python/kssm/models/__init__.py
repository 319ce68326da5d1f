"""The K-SSM language models."""

from kssm.models.base import KSSMv1, KSSMv2, KSSMv3, OscillatorLM

__all__ = ["KSSMv1", "KSSMv2", "KSSMv3", "OscillatorLM"]
