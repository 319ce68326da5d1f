"""What Triton's interpreter does differently from a device, put right for the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def round_to_bfloat16() -> None:
    """The interpreter of Triton 3.9 cuts float32 off to bfloat16; devices round to the nearest, as torch does."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    cut_off = builder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            wide = torch.from_numpy(np.ascontiguousarray(source.data))
            bits = wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)
        return cut_off(self, source, to)

    builder.cast_impl = cast_impl
