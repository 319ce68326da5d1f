"""Layers that start small."""

from __future__ import annotations

from torch import nn

__all__ = ["INIT_STD", "SmallEmbedding", "SmallLinear"]

# A tied head multiplies by the embedding: at nn.Embedding's N(0, 1) the first logits would have a standard deviation
# of sqrt(D) (20 at D = 384) and the first loss lie tens of nats above log(vocabulary); at 0.02 it starts there.
INIT_STD = 0.02


class SmallEmbedding(nn.Embedding):
    """An embedding that starts as N(0, std)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = INIT_STD) -> None:
        self.std = std  # before nn.Embedding's own __init__, which calls reset_parameters
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class SmallLinear(nn.Linear):
    """A matrix without bias that starts as N(0, std)."""

    def __init__(self, in_features: int, out_features: int, std: float = INIT_STD) -> None:
        self.std = std  # before nn.Linear's own __init__, which calls reset_parameters
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
