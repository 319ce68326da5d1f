"""The K-SSM language models v1, v2 and v3: tokens in, logits and the order parameter R of every layer out.

In all three nothing crosses positions: token t's logits depend on token t (and, in v2 and v3, on its position) alone,
so the best any of them can reach is the entropy of a token given the one before it.
"""

from kssm.models.base import OscillatorLM
from kssm.models.v1 import KSSMv1
from kssm.models.v2 import KSSMv2
from kssm.models.v3 import KSSMv3

__all__ = ["KSSMv1", "KSSMv2", "KSSMv3", "OscillatorLM"]
