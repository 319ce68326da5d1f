"""The K-SSM language models v1, v2 and v3: tokens in, logits and the order parameter R of every layer out.

In all three nothing crosses positions: token t's logits depend on token t (and, in v2 and v3, on its position) alone,
so the best any of them can reach is the entropy of a token given the one before it.
"""

from kssm.models.base import Architecture, OscillatorLM
from kssm.models.v1 import KSSMv1, V1Config
from kssm.models.v2 import KSSMv2, V2Config
from kssm.models.v3 import KSSMv3, V3Config

__all__ = ["ARCHITECTURES", "Architecture", "KSSMv1", "KSSMv2", "KSSMv3", "OscillatorLM"]

ARCHITECTURES: dict[str, type[Architecture]] = {"v1": V1Config, "v2": V2Config, "v3": V3Config}
