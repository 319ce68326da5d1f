"""The K-SSM language models v1 to v4, which also tell the order parameter R of every layer, and baselines.

In v1, v2 and v3 nothing crosses positions: token t's logits depend on token t (and, in v2 and v3, on its position)
alone, so the best any of them can reach is the entropy of a token given the one before it. v4 has a state.
"""

from kssm.models.base import Architecture, LanguageModel, RecurrentLM
from kssm.models.baselines import GPT, GRU, LSTM, GPTConfig, GRUConfig, LSTMConfig, SelectiveSSM, SelectiveSSMConfig
from kssm.models.v1 import KSSMv1, V1Config
from kssm.models.v2 import KSSMv2, V2Config
from kssm.models.v3 import KSSMv3, V3Config
from kssm.models.v4 import KSSMv4, V4Config

__all__ = [
    "ARCHITECTURES",
    "GPT",
    "GRU",
    "LSTM",
    "Architecture",
    "KSSMv1",
    "KSSMv2",
    "KSSMv3",
    "KSSMv4",
    "LanguageModel",
    "RecurrentLM",
    "SelectiveSSM",
]

ARCHITECTURES: dict[str, type[Architecture]] = {
    "v1": V1Config,
    "v2": V2Config,
    "v3": V3Config,
    "v4": V4Config,
    "gpt": GPTConfig,
    "gru": GRUConfig,
    "lstm": LSTMConfig,
    "mamba": SelectiveSSMConfig,
}
