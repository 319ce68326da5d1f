"""Language models without oscillators, as strong as their users make them: what the K-SSM models are measured against.

All of them are :class:`~kssm.models.base.RecurrentLM`: they carry a state from token to token.
"""

from kssm.models.baselines.gpt import GPT, GPTConfig
from kssm.models.baselines.recurrent import GRU, LSTM, GRUConfig, LSTMConfig
from kssm.models.baselines.selective import SelectiveSSM, SelectiveSSMConfig

__all__ = ["GPT", "GRU", "LSTM", "GPTConfig", "GRUConfig", "LSTMConfig", "SelectiveSSM", "SelectiveSSMConfig"]
