"""One of two processes that step a sharded model; tests/optim/test_sign_split_distributed.py starts both.

``python -m tests.support.sign_split_distributed CASE RANK FOLDER``: gloo on the CPU; FOLDER holds rendezvous and
checkpoints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from kssm_kernels.optim import SignSplitEMA

STEPS, WORLD = 3, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "normalized": {"weight_decay": 0.1},
    "temperature": {"temperature": {"floor": 0.1}, "state_dtype": torch.bfloat16},
    "consolidate": {"mode": "consolidate"},
}


def distributed_tensors() -> ModuleType:
    """The module of DTensor and its placements, which was private until torch 2.5."""
    return import_module(f"torch.distributed.{'tensor' if torch.__version__ >= '2.5' else '_tensor'}")


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, distributed_tensors().DTensor) else t


def model_of(seed: int) -> nn.Module:
    """Sizes that two do not divide: the second process has fewer rows, and of the last bias none."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard  # public since torch 2.6: the caller skips before

    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, steps: int = STEPS) -> None:
    for k in range(first, first + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad(set_to_none=True)
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()


def assert_same(a: nn.Module, of_a: SignSplitEMA, b: nn.Module, of_b: SignSplitEMA, slack: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=slack, atol=slack, msg=lambda m, n=name: f"{n}: {m}")
        mine, theirs = of_a.state[p], of_b.state[q]
        assert set(mine) == set(theirs)
        for key in mine:
            assert mine[key].dtype == theirs[key].dtype
            torch.testing.assert_close(
                whole(mine[key]),
                whole(theirs[key]),
                rtol=max(slack, 2**-7 if slack and mine[key].dtype == torch.bfloat16 else 0),
                atol=slack,
                msg=lambda m, n=name, k=key: f"{k} of {n}: {m}",
            )


def fsdp(folder: Path) -> None:
    """Shards step as the whole model does, and go on from a checkpoint bit for bit."""
    for number, options in enumerate(OPTIONS.values()):
        plain, model = model_of(0), sharded(model_of(0))
        plainly, optimizer = SignSplitEMA(plain.parameters(), **options), SignSplitEMA(model.parameters(), **options)
        trained(plain, plainly)
        trained(model, optimizer)
        assert_same(model, optimizer, plain, plainly, slack=1e-5)  # gradients are averaged in another order

        path = folder / str(number)
        of_model, of_optimizer = get_state_dict(model, optimizer)
        checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)
        other = sharded(model_of(1))
        resumed = SignSplitEMA(other.parameters(), **options)
        of_model, of_optimizer = get_state_dict(other, resumed)
        loaded = {"model": of_model, "optimizer": of_optimizer}
        checkpoint.load(loaded, checkpoint_id=path)
        set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        assert_same(other, resumed, model, optimizer, slack=0.0)
        trained(model, optimizer, STEPS)
        trained(other, resumed, STEPS)
        assert_same(other, resumed, model, optimizer, slack=0.0)


def dtensor(folder: Path) -> None:
    """Any placement: rows, columns and copies of one parameter step as it does."""
    module = distributed_tensors()
    mesh = init_device_mesh("cpu", (WORLD,))
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(5, 6, generator=g), [torch.randn(5, 6, generator=g) for _ in range(STEPS)]
    for mode in ("paper", "normalized", "consolidate"):
        for placement in (module.Shard(0), module.Shard(1), module.Replicate()):
            p = nn.Parameter(start.clone())
            q = nn.Parameter(module.distribute_tensor(start, mesh, [placement]))
            mine, theirs = SignSplitEMA([p], lr=0.1, mode=mode), SignSplitEMA([q], lr=0.1, mode=mode)
            for grad in grads:
                p.grad, q.grad = grad.clone(), module.distribute_tensor(grad, mesh, [placement])
                mine.step()
                theirs.step()
            slack = 1e-6 if mode == "consolidate" else 0.0  # the order of the sum behind the rms
            torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=slack, atol=slack)


def refused(folder: Path) -> None:
    module = distributed_tensors()
    mesh = init_device_mesh("cpu", (WORLD,))
    p = nn.Parameter(module.distribute_tensor(torch.ones(100, 100), mesh, [module.Shard(0)]))
    before = whole(p.detach()).clone()
    p.grad = module.distribute_tensor(torch.ones(100, 100), mesh, [module.Shard(0)])
    with pytest.raises(NotImplementedError, match="8-bit states of a DTensor"):
        SignSplitEMA([p], state_dtype=torch.uint8).step()
    assert torch.equal(whole(p.detach()), before)


CASES: dict[str, Callable[[Path], None]] = {"fsdp": fsdp, "dtensor": dtensor, "refused": refused}


def main(case: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        CASES[case](folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # A thread of gloo that still holds a tensor when the interpreter goes down aborts the process, once in a hundred
    # runs here (https://github.com/pytorch/pytorch/pull/179291). All that was to be done is done.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
