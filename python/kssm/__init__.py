"""K-SSM language models on fused oscillator kernels, and the trainer that uses them.

Models: :class:`KSSMv1`, :class:`KSSMv2`, :class:`KSSMv3`, :class:`KSSMv4`; as baselines :class:`GPT`, :class:`GRU`,
:class:`LSTM` and :class:`SelectiveSSM`. Command line: ``kssm train`` and ``kssm sample`` (also ``python -m kssm``). The
models need torch and :mod:`kssm_kernels` only; the command line also needs the ``train`` extra.

>>> import torch
>>> from kssm import KSSMv3
>>> model = KSSMv3(vocab_size=65, hidden_dim=32, n_layers=2, n_oscillators=16, n_harmonics=4)
>>> model(torch.zeros(1, 5, dtype=torch.int64)).shape
torch.Size([1, 5, 65])
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kssm.models import GPT, GRU, LSTM, KSSMv1, KSSMv2, KSSMv3, KSSMv4, LanguageModel, RecurrentLM, SelectiveSSM

__all__ = ["GPT", "GRU", "LSTM", "KSSMv1", "KSSMv2", "KSSMv3", "KSSMv4", "LanguageModel", "RecurrentLM", "SelectiveSSM"]


def __getattr__(name: str) -> Any:
    """The models when they are first asked for: the command line settles how threads wait before torch is loaded."""
    if name in __all__:
        from kssm import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
