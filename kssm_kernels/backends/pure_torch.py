"""The pure-torch path, which runs wherever torch does."""

from __future__ import annotations

import torch


def status() -> tuple[bool, str]:
    return True, "pure-torch path"


def refuses(tensor: torch.Tensor) -> str | None:
    return None
