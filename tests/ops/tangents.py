"""What the tests of operators with tangents share: inputs in the layouts that models produce, and the accuracy rule."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "slice", "expanded")

# rows -> how often random numbers are drawn: few numbers may round well or badly by chance, so the worst draws compare.
DRAWS = {1: 6, 5: 3, 97: 1, 123: 1, 1025: 1}
WIDTHS = (1, 59, 96, 1120, 2048, 8192)
MAX_ELEMENTS = 60_000  # larger products would add nothing but time


def rows_of_width(width: int) -> list[int]:
    return [rows for rows in DRAWS if rows * width <= MAX_ELEMENTS]


def strided(shape: Sequence[int], layout: str, dtype: torch.dtype) -> Tensor:
    """Random numbers in one of the LAYOUTS."""
    if layout == "transposed":
        return torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "slice":
        return torch.randn([*shape[:-1], 2 * shape[-1] + 1]).to(dtype)[..., 1::2]
    if layout == "expanded":
        return torch.randn([1] * (len(shape) - 1) + [shape[-1]]).to(dtype).expand(*shape)
    return torch.randn(list(shape)).to(dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) * 2


def large_mean(*shape: int) -> Tensor:
    return torch.randn(shape) + 100


def outliers(*shape: int) -> Tensor:
    x = torch.randn(shape)
    x[..., shape[-1] // 2] = 1e4
    x[..., 0] = -3e3
    return x


DISTRIBUTIONS = (normal, large_mean, outliers)


@dataclass
class Exact:
    """Results in float64, and for each the sum of the magnitudes of its terms, which its error is relative to."""

    results: Sequence[Tensor]
    terms: Sequence[Tensor]

    def errors(self, found: Sequence[Tensor]) -> list[float]:
        """Return the largest relative error of an element, result by result."""
        return [_error(*each) for each in zip(found, self.results, self.terms, strict=True)]


def _error(found: Tensor, exact: Tensor, terms: Tensor) -> float:
    limits = torch.finfo(found.dtype)
    overflows = exact.abs() > limits.max
    assert torch.equal(found[overflows], exact[overflows].to(found.dtype))
    error = (found.double() - exact).abs() / terms.clamp(min=limits.smallest_normal)
    return error.where(~overflows, 0).max().item()


def assert_at_most_twice_the_error(
    runs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Exact]], told: object
) -> None:
    """Compare the worst error over runs of (found, the composite's, exact), result by result.

    Twice the rounding of a result to its dtype is always allowed.
    """
    rounding = torch.finfo(runs[0][0][0].dtype).eps / 2
    errors = torch.tensor([exact.errors(found) for found, _, exact in runs]).amax(0)
    composite_errors = torch.tensor([exact.errors(composite) for _, composite, exact in runs]).amax(0)
    assert (errors <= 2 * composite_errors.clamp(min=rounding)).all(), (
        f"{told}: {errors.tolist()}, the composite's {composite_errors.tolist()}"
    )


def assert_probes_are_single_tangents(operator: Callable[..., Sequence[Tensor]], probes: Sequence[Tensor]) -> None:
    """Call an operator, given its primals, with tangents [P, ...] and with each of them alone: to the same bits.

    It returns the primal's result, the tangents', and perhaps more of the primal.
    """
    primal, tangents, *others = operator(*probes)
    assert len(tangents) == len(probes[0])
    for i, tangent in enumerate(tangents):
        single = operator(*(each[i] for each in probes))
        for x, y in zip((primal, tangent, *others), single, strict=True):
            assert torch.equal(x, y), f"probe {i}"


def on_thread_counts(
    call: Callable[[], Sequence[Tensor]], counts: Sequence[int] = (1, 2, 3, 1)
) -> Iterator[Sequence[Tensor]]:
    """Yield what `call` returns on so many threads."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield call()
    finally:
        torch.set_num_threads(before)


def run_with_capability(capability: str, program: str) -> None:
    """Run a Python program on an instruction set of PyTorch's naming; skip the one that all other tests run on."""
    if torch.backends.cpu.get_cpu_capability() in (capability.upper(), "DEFAULT"):
        pytest.skip("the other tests run on all that this processor has of it")
    program += "\nprint(torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability.upper()
