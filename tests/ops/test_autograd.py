"""Gradients, fake tensors, torch.compile and checkpointing: what autograd and the compiler make of the operator."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparsecod_mcore.ops import NUM_COLUMN_SUMS, Moment, residual_add_moments, residual_add_moments_reference
from tests.ops import oracle

ROWS, WIDTH = 6, 24


def inputs(dtype: torch.dtype = torch.float32, requires_grad: bool = True, width: int = WIDTH) -> list[torch.Tensor]:
    """Branch [2, 3, width], residual and bias."""
    torch.manual_seed(0)
    shapes = ((2, 3, width), (2, 3, width), (width,))
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def loss_and_gradients(add, branch, residual, bias):
    """Gradients of a loss that depends on y non-linearly, and the moments."""
    moments = oracle.no_moments()
    loss = add(branch.sin(), residual * 2, moments, bias).square().sum()
    return loss, torch.autograd.grad(loss, [branch, residual, bias]), moments


@pytest.mark.parametrize("operator", [residual_add_moments, residual_add_moments_reference])
def test_gradcheck(operator):
    def add(branch, residual, bias):
        return operator(branch, residual, oracle.no_moments(), bias)

    assert torch.autograd.gradcheck(add, inputs(torch.float64, width=3))
    assert torch.autograd.gradgradcheck(add, inputs(torch.float64, width=1))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_what_needs_them(needs, dtype):
    arguments = [x.requires_grad_(bool(need)) for x, need in zip(inputs(dtype, False), needs, strict=True)]
    branch, residual, bias = arguments
    output = residual_add_moments(branch, residual, oracle.no_moments(), bias)
    weights = torch.randn(output.shape).to(dtype)
    output.backward(weights)
    expected = (weights, weights, weights.sum((0, 1)))
    for x, need, gradient in zip(arguments, needs, expected, strict=True):
        assert (x.grad is not None) == need
        if need:
            torch.testing.assert_close(x.grad, gradient)


def test_no_gradient_is_recorded_where_none_is_needed():
    branch, residual, bias = inputs(requires_grad=False)
    assert not residual_add_moments(branch, residual, oracle.no_moments(), bias).requires_grad
    branch.requires_grad_()
    with torch.no_grad():
        assert not residual_add_moments(branch, residual, oracle.no_moments(), bias).requires_grad


def test_inference_mode():
    branch, residual, bias = inputs(requires_grad=False)
    moments, expected = oracle.no_moments(), oracle.no_moments()
    residual_add_moments(branch, residual, expected, bias)
    with torch.inference_mode():
        residual_add_moments(branch, residual, moments, bias)
        inside = oracle.no_moments()
        residual_add_moments(branch.clone(), residual.clone(), inside, bias)
    assert torch.equal(moments, expected) and torch.equal(inside, expected)


def test_autograd_sees_that_the_moments_change():
    branch, residual, bias = inputs()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    moments = oracle.no_moments()
    saved_for_backward = (scale * moments).sum()
    residual_add_moments(branch, residual, moments, bias)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved_for_backward.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("has_columns", [False, True])
def test_opcheck(dtype, has_bias, requires_grad, has_columns):
    columns = torch.zeros(NUM_COLUMN_SUMS, WIDTH, dtype=torch.float64) if has_columns else None
    branch, residual, bias = inputs(dtype, requires_grad)
    operator = torch.ops.sparsecod.residual_add_moments.default
    torch.library.opcheck(operator, (branch, residual, bias if has_bias else None, oracle.no_moments(), columns))
    transposed = branch.detach().transpose(0, 1).requires_grad_(requires_grad)
    torch.library.opcheck(operator, (transposed, residual.view(3, 2, WIDTH), None, oracle.no_moments(), columns))


def test_meta_tensors_have_the_shape_and_no_values():
    branch, residual, bias = (x.detach().to("meta") for x in inputs(torch.bfloat16))
    output = residual_add_moments(
        branch.transpose(0, 1), residual.transpose(0, 1), oracle.no_moments().to("meta"), bias
    )
    assert (output.device.type, output.shape, output.dtype) == ("meta", (3, 2, WIDTH), torch.bfloat16)
    assert output.is_contiguous()


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled_forward_and_backward_count_once(backend, dynamic):
    torch.compiler.reset()
    arguments = inputs()
    loss, gradients, moments = loss_and_gradients(residual_add_moments, *arguments)

    @torch.compile(backend=backend, fullgraph=True, dynamic=dynamic)
    def compiled(branch, residual, moments, bias):
        return residual_add_moments(branch.sin(), residual * 2, moments, bias).square().sum()

    measured = oracle.no_moments()
    for calls in (1, 2):
        compiled_loss = compiled(arguments[0], arguments[1], measured, arguments[2])
        torch.testing.assert_close(compiled_loss, loss)
        torch.testing.assert_close(torch.autograd.grad(compiled_loss, arguments), gradients)
        assert measured[Moment.TOKENS] == calls * ROWS
        torch.testing.assert_close(measured[Moment.OUTPUT_KURTOSIS], calls * moments[Moment.OUTPUT_KURTOSIS])


def test_compiled_without_gradients_into_a_row_of_a_buffer():
    torch.compiler.reset()
    branch, residual, bias = inputs(requires_grad=False)
    buffer, expected = torch.zeros(3, len(Moment), dtype=torch.float64), oracle.no_moments()
    residual_add_moments(branch, residual, expected, bias)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(buffer):
        return residual_add_moments(branch, residual, buffer[1], bias)

    compiled(buffer)
    assert torch.equal(buffer[1], expected)
    assert not buffer[0].any() and not buffer[2].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    arguments = inputs()
    _, expected, moments = loss_and_gradients(residual_add_moments, *arguments)
    recomputed = oracle.no_moments()

    def block(branch, residual, bias):
        return residual_add_moments(branch.sin(), residual * 2, recomputed, bias).square().sum()

    checkpoint(block, *arguments, use_reentrant=use_reentrant).backward()
    for x, gradient in zip(arguments, expected, strict=True):
        torch.testing.assert_close(x.grad, gradient)
    assert recomputed[Moment.TOKENS] == 2 * moments[Moment.TOKENS]  # a recomputed forward adds as well
