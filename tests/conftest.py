"""Every test starts from the same seeds on two threads, with NaN in every tensor that torch hands out uninitialised."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

import kssm_kernels
from tests.support import devices

hypothesis.settings.register_profile(
    "kssm",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "kssm"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    # torch fills what torch.empty, new_empty, empty_like, empty_strided and resize_ return, wherever they are called
    # from, when deterministic algorithms are on (tests/ops/test_poison.py shows that it does); warn_only keeps
    # operators without a deterministic form usable.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(2)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="kssm_kernels runs on the slower pure-torch path")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=devices.backends_of("cpu"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every backend that can run on CPU tensors here."""
    if request.param == "torch":  # torch's own threads are not under test; on a busy machine they wait for each other
        torch.set_num_threads(1)
    with kssm_kernels.use_backend(request.param):
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a backend does not serve (devices.serves); a request for it raises, as test_errors.py shows.

    A module whose tests are all of one op names it, ``OP = "..."``.
    """

    def is_served(item: pytest.Item) -> bool:
        given = getattr(getattr(item, "callspec", None), "params", {})
        op = getattr(getattr(item, "module", None), "OP", None)
        return "backend" not in given or devices.serves(given["backend"], given.get("dtype"), op)

    left_out = [not is_served(item) for item in items]
    config.hook.pytest_deselected(items=[item for item, out in zip(items, left_out, strict=True) if out])
    items[:] = [item for item, out in zip(items, left_out, strict=True) if not out]


@pytest.fixture
def one_thread() -> None:
    """For tensors too small to share: waiting threads slow whatever else runs."""
    torch.set_num_threads(1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    draw = random.Random(0)
    words = ["phase", "lag", "order", "drift", "lock", "omega"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(draw.choice(words) for _ in range(600)), encoding="utf-8")
    return path
