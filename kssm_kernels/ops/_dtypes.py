"""The dtypes of phases and parameters."""

from __future__ import annotations

import torch

# dtype -> (code in csrc/calls.h, compute dtype inside)
DTYPES: dict[torch.dtype, tuple[int, torch.dtype]] = {
    torch.float32: (0, torch.float32),
    torch.float64: (1, torch.float64),
    torch.bfloat16: (2, torch.float32),
    torch.float16: (3, torch.float32),
}
