"""A job of one process, in float64 throughout."""

from collections.abc import Iterator

import pytest
import torch

from tests.jvp.models import one_process


@pytest.fixture(autouse=True, scope="module")
def process() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(autouse=True)
def float64_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron takes the softmax of router logits in float32; derivatives are compared to more digits than that."""
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
