"""What an operator does with CUDA tensors where the extension was built without CUDA.

No GPU is needed: the kernel that the dispatcher would run for CUDA tensors is called with others.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sparsecod_mcore.ops import cuda_build

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
COUNTER = itertools.count()  # an operator is for good: each test has its own


def check(x: Tensor, *, scale: float = 2) -> Tensor:
    if x.dim() == 0:
        raise ValueError("x has shape [], but must have shape [..., D]")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@pytest.fixture
def operator() -> tuple[str, Callable[..., Tensor]]:
    """A new operator of ours without CUDA kernel: its name, and how to call it as if with CUDA tensors."""
    name = f"fallback_test_{next(COUNTER)}"
    torch.library.define(f"sparsecod::{name}", "(Tensor x, *, float scale=2) -> Tensor")
    torch.library.impl(f"sparsecod::{name}", "Meta")(check)
    overload = getattr(torch.ops.sparsecod, name).default
    return name, lambda *args, **kwargs: overload.redispatch(CUDA, *args, **kwargs)


def reference(x: Tensor, *, scale: float = 2) -> Tensor:
    return x * scale


@pytest.mark.parametrize("value", [None, "0", "true", ""])
def test_without_cuda_the_operator_says_how_to_build_it(monkeypatch, operator, value):
    name, call = operator
    monkeypatch.setattr(cuda_build, "_C", SimpleNamespace(HAS_CUDA=False))
    cuda_build.register_cuda_fallback(name, reference)
    if value is None:
        monkeypatch.delenv("SPARSECOD_FALLBACK", raising=False)
    else:
        monkeypatch.setenv("SPARSECOD_FALLBACK", value)
    with pytest.raises(RuntimeError) as error:
        call(torch.ones(2))
    assert str(error.value) == (
        f"sparsecod::{name} was given CUDA tensors, but the extension was built without CUDA: build it with "
        "SPARSECOD_CUDA=on where nvcc is, or set SPARSECOD_FALLBACK=1 for the slower PyTorch reference"
    )


def test_without_cuda_the_reference_stands_in_if_asked(monkeypatch, operator):
    name, call = operator
    monkeypatch.setattr(cuda_build, "_C", SimpleNamespace(HAS_CUDA=False))
    cuda_build.register_cuda_fallback(name, reference)
    monkeypatch.setenv("SPARSECOD_FALLBACK", "1")
    assert torch.equal(call(torch.ones(2)), torch.full([2], 2.0))
    assert torch.equal(call(torch.ones(2), scale=3), torch.full([2], 3.0))


def test_the_stand_in_checks_its_arguments_and_lays_out_its_results(monkeypatch, operator):
    name, call = operator
    monkeypatch.setattr(cuda_build, "_C", SimpleNamespace(HAS_CUDA=False))
    cuda_build.register_cuda_fallback(name, reference)
    monkeypatch.setenv("SPARSECOD_FALLBACK", "1")
    transposed = torch.rand(3, 5).t()
    assert torch.equal(call(transposed), 2 * transposed) and call(transposed).is_contiguous()
    with pytest.raises(ValueError, match="x has shape"):
        call(torch.ones(()))


def test_with_cuda_nothing_stands_in(monkeypatch, operator):
    name, call = operator
    monkeypatch.setattr(cuda_build, "_C", SimpleNamespace(HAS_CUDA=True))
    cuda_build.register_cuda_fallback(name, reference)
    monkeypatch.setenv("SPARSECOD_FALLBACK", "1")
    with pytest.raises(NotImplementedError, match="CUDA"):
        call(torch.ones(2))
