"""Every operator against float64: its error is at most twice that of plain PyTorch in the same dtype.

On CUDA with `pytest -m gpu`; on CPU over one shape each, which keeps the table of operators honest without a GPU.
"""

import pytest
import torch

from tests.gpu.operators import DISTRIBUTIONS, LAYOUTS, OPERATORS, ROUNDING, Operator, contiguous, to

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=OPERATORS, ids=lambda operator: operator.name)
def operator(request) -> Operator:
    return request.param


def check_accuracy(operator, device, dtype, distribution, layout, shapes):
    torch.manual_seed(0)
    for shape in shapes:
        arguments = to(operator.arguments(lambda size: distribution(size, dtype), shape), device, layout)
        results = operator(*arguments)
        exact = operator.exact(*arguments)
        errors = operator.errors(results, exact)
        allowed = [2 * e + ROUNDING for e in operator.errors(operator.composite(*arguments), exact)]
        for i, (error, most) in enumerate(zip(errors, allowed, strict=True)):
            assert (error <= most).all(), f"{shape}, result {i}: error {error}, at most {most}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_accuracy(operator, device, dtype, distribution):
    if distribution not in operator.distributions:
        pytest.skip("a distribution that this operator amplifies")
    shapes = operator.shapes if device == "cuda" else [operator.small]
    check_accuracy(operator, device, dtype, distribution, contiguous, shapes)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(operator, device, layout):
    shapes = operator.shapes if device == "cuda" else [operator.small]
    for dtype in (torch.float32, torch.bfloat16):
        check_accuracy(operator, device, dtype, operator.distributions[0], layout, shapes)


def test_the_same_bits_from_run_to_run(operator, device):
    torch.manual_seed(0)
    shape = operator.shapes[-1] if device == "cuda" else operator.small
    arguments = to(operator.arguments(lambda size: torch.randn(size).bfloat16(), shape), device)
    first = operator(*arguments)
    for _ in range(5 if device == "cuda" else 1):
        again = operator(*arguments)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
