"""The residual add measures what trains, once, and never changes what is added."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparsecod_mcore.model.residual import MLP_ADD, MeasuredResidualAdd
from sparsecod_mcore.monitor.buffer import MomentsBuffer
from sparsecod_mcore.ops import Moment

S, B, D = 5, 3, 24


@pytest.fixture
def buffer() -> MomentsBuffer:
    buffer = MomentsBuffer(1, 2, "cpu")
    buffer.begin(1)
    return buffer


@pytest.fixture
def add(buffer: MomentsBuffer) -> MeasuredResidualAdd:
    add = MeasuredResidualAdd()
    add.bind(buffer, 1, MLP_ADD)
    return add


def tokens(buffer: MomentsBuffer) -> float:
    return buffer.moments_ILAM[0, 1, MLP_ADD, Moment.TOKENS].item()


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    branch, residual = (torch.randn(S, B, D, dtype=dtype, requires_grad=True) for _ in range(2))
    return branch, residual, torch.randn(D, dtype=dtype)


def test_training_forward_counts(add: MeasuredResidualAdd, buffer: MomentsBuffer) -> None:
    branch, residual, bias = operands()
    summed = add(True, False)((branch, bias), residual, 0.0)
    torch.testing.assert_close(summed, branch + bias + residual)
    assert tokens(buffer) == S * B
    assert buffer.moments_ILAM[0, 0].count_nonzero() == 0, "another layer's moments were touched"
    summed.sum().backward()
    assert branch.grad is not None and residual.grad is not None
    assert (branch.grad == 1).all() and (residual.grad == 1).all()


def test_what_does_not_count(add: MeasuredResidualAdd, buffer: MomentsBuffer) -> None:
    branch, residual, _ = operands()
    add(False, False)((branch, None), residual, 0.0)  # evaluation
    with torch.no_grad():
        add(True, False)((branch, None), residual, 0.0)  # the first forward under full recomputation
    MeasuredResidualAdd()(True, False)((branch, None), residual, 0.0)  # bound to no layer: MTP
    buffer.end()
    add(True, False)((branch, None), residual, 0.0)  # a step that is not measured
    assert not buffer.moments_ILAM.any()


def test_every_forward_counts_where_it_is_bound_in_evaluation(add: MeasuredResidualAdd, buffer: MomentsBuffer) -> None:
    branch, residual, bias = (x.detach() for x in operands())
    add.bind(buffer, 1, MLP_ADD, in_evaluation=True)
    with torch.no_grad():
        summed = add(False, False)((branch, bias), residual, 0.5)
    assert tokens(buffer) == S * B and torch.equal(summed, residual + (branch + bias))
    add.bind(None, 1, MLP_ADD)
    add(False, False)((branch, bias), residual, 0.0)
    assert tokens(buffer) == S * B


def test_recomputation_counts_once(add: MeasuredResidualAdd, buffer: MomentsBuffer) -> None:
    branch, residual, _ = operands()

    def layer(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        branch = torch.tanh(hidden)
        with torch.enable_grad():  # as Megatron has it around its adds
            return add(True, False)((branch, None), residual, 0.0)

    checkpoint(layer, branch, residual, use_reentrant=True).sum().backward()
    assert tokens(buffer) == S * B


def test_measuring_does_not_change_what_is_added(add: MeasuredResidualAdd, buffer: MomentsBuffer) -> None:
    branch, residual, bias = operands(torch.bfloat16)
    measured = add(True, False)((branch, bias), residual, 0.0)
    assert tokens(buffer) == S * B
    buffer.end()
    assert torch.equal(add(True, False)((branch, bias), residual, 0.0), measured)


def test_dropout_is_measured_as_added(add: MeasuredResidualAdd, buffer: MomentsBuffer) -> None:
    branch, residual, bias = operands()
    torch.manual_seed(3)
    summed = add(True, False)((branch, bias), residual, 0.5)
    added = (summed - residual).detach().double()
    assert (added.abs() < 1e-6).float().mean() > 0.3
    variance = buffer.moments_ILAM[0, 1, MLP_ADD, Moment.BRANCH_VARIANCE] / tokens(buffer)
    torch.testing.assert_close(variance, added.var(-1, correction=0).mean(), rtol=1e-5, atol=0)
    assert torch.equal(add(False, False)((branch, bias), residual, 0.5), residual + (branch + bias))


def test_float32_stream_of_a_bfloat16_model(add: MeasuredResidualAdd, buffer: MomentsBuffer) -> None:
    branch, _, bias = operands(torch.bfloat16)
    residual = torch.randn(S, B, D, requires_grad=True)
    summed = add(True, False)((branch, bias), residual, 0.0)
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed, branch.float() + bias.float() + residual)
    assert tokens(buffer) == S * B
