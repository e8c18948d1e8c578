"""What holds of any input: layouts, special values, how calls add up, and the same bits on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_mcore.ops import Moment, residual_add_moments, residual_add_moments_reference
from tests.ops import oracle, tangents
from tests.ops.oracle import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def strided(shape: list[int], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of random numbers in a layout that models produce."""
    if layout == "transposed":
        return torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "slice":
        return torch.randn([*shape[:-1], 2 * shape[-1] + 1]).to(dtype)[..., 1::2]
    if layout == "expanded":
        return torch.randn([1] * (len(shape) - 1) + shape[-1:]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


layouts = st.sampled_from(["contiguous", "transposed", "slice", "expanded"])


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), max_size=2).flatmap(
        lambda leading: st.integers(1, 150).map(lambda width: [*leading, width])
    ),
    dtype=st.sampled_from(DTYPES),
    branch_layout=layouts,
    residual_layout=layouts,
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_and_dtype(shape, dtype, branch_layout, residual_layout, has_bias, seed):
    torch.manual_seed(seed)
    bias = strided(shape[-1:], "slice", dtype) if has_bias else None
    case = Case(strided(shape, branch_layout, dtype), strided(shape, residual_layout, dtype), bias)
    moments = oracle.no_moments()
    output = residual_add_moments(case.branch, case.residual, moments, case.bias)
    assert output.is_contiguous() and output.dtype == dtype
    assert torch.equal(output, oracle.output(case).to(dtype))
    assert oracle.error(moments, oracle.moments(case)).max() < 1e-5
    reference_output = residual_add_moments_reference(case.branch, case.residual, oracle.no_moments(), case.bias)
    assert reference_output.is_contiguous() and torch.equal(reference_output, output)


def test_calls_add_to_the_moments_and_maxima_grow():
    torch.manual_seed(0)
    branch, residual = torch.randn(12, 40), torch.randn(12, 40)
    whole, parts = oracle.no_moments(), oracle.no_moments()
    residual_add_moments(branch, residual, whole)
    for i in range(0, 12, 4):
        residual_add_moments(branch[i : i + 4], residual[i : i + 4], parts)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("operator", [residual_add_moments, residual_add_moments_reference])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
def test_an_empty_input_adds_nothing(operator, shape):
    moments = torch.rand(len(Moment), dtype=torch.float64)
    before = moments.clone()
    assert operator(torch.randn(shape), torch.randn(shape), moments).shape == shape
    assert torch.equal(moments, before)


@pytest.mark.parametrize("operator", [residual_add_moments, residual_add_moments_reference])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 333])
def test_constant_tokens_have_no_variance_and_no_kurtosis(operator, dtype, width):
    constant = torch.tensor([[0.1], [0.0], [-7e3], [3.3]], dtype=dtype).expand(4, width)
    moments = oracle.no_moments()
    operator(constant, constant / 3, moments)
    for name in ("VARIANCE", "FOURTH_MOMENT", "KURTOSIS"):
        assert [moments[Moment[f"{operand}_{name}"]].item() for operand in oracle.OPERANDS] == [0, 0, 0]
    squared_mean = constant[:, 0].double().square().sum()
    torch.testing.assert_close(moments[Moment.BRANCH_SQUARED_MEAN], squared_mean, rtol=1e-7, atol=0)
    assert moments[Moment.COVARIANCE] == 0


@pytest.mark.parametrize("operator", [residual_add_moments, residual_add_moments_reference])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 70])
def test_elements_that_are_not_finite_are_counted_and_not_hidden(operator, dtype, width):
    torch.manual_seed(0)
    branch, residual = torch.randn(6, width).to(dtype), torch.randn(6, width).to(dtype)
    branch[1, 0], branch[2, -1], branch[4, width // 2] = torch.inf, -torch.inf, torch.nan
    residual[1, 0] = -torch.inf
    moments = oracle.no_moments()
    output = operator(branch, residual, moments)
    torch.testing.assert_close(output, branch + residual, equal_nan=True)
    for operand, x in (("BRANCH", branch), ("RESIDUAL", residual), ("OUTPUT", oracle.output(Case(branch, residual)))):
        assert moments[Moment[f"{operand}_NONFINITE"]] == (~x.isfinite()).sum()
        assert moments[Moment[f"{operand}_MAX"]] == x[x.isfinite()].abs().max()
        for name in ("VARIANCE", "SQUARED_MEAN", "FOURTH_MOMENT", "KURTOSIS"):
            assert moments[Moment[f"{operand}_{name}"]].isnan()
    assert moments[Moment.COVARIANCE].isnan()
    assert moments[Moment.TOKENS] == 6


def test_an_output_that_overflows_spoils_its_own_sums_only():
    branch = torch.full((2, 50), 3e38)
    moments = oracle.no_moments()
    assert residual_add_moments(branch, branch, moments).isinf().all()
    assert moments[Moment.OUTPUT_NONFINITE] == 100 and moments[Moment.OUTPUT_VARIANCE].isnan()
    assert moments[Moment.BRANCH_NONFINITE] == 0 and moments[Moment.BRANCH_VARIANCE] == 0
    assert moments[Moment.BRANCH_MAX] == branch[0, 0]


def test_nan_with_any_payload_stays_nan_in_bfloat16():
    patterns = torch.arange(-128, 128, dtype=torch.int16)
    every_exponent_set = (patterns.int() << 8 | 0x7F80 | torch.arange(256).int() & 0x7F).to(torch.int16)
    branch = every_exponent_set.view(torch.bfloat16).repeat(2)
    for residual in (torch.zeros_like(branch), torch.full_like(branch, torch.inf), branch.flip(0)):
        output = residual_add_moments(branch, residual, oracle.no_moments())
        torch.testing.assert_close(output, branch + residual, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(dtype):
    torch.manual_seed(0)
    branch, residual = torch.randn(1500, 70).to(dtype), torch.randn(1500, 70).to(dtype) + 1
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5, 5):
            torch.set_num_threads(count)
            moments = oracle.no_moments()
            residual_add_moments(branch, residual, moments)
            results.append(moments)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(moments, results[0]) for moments in results)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_measures_the_same(capability):
    program = """
import torch
from sparsecod_mcore.ops import residual_add_moments, residual_add_moments_reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    branch, residual, bias = (torch.randn(s).to(dtype) for s in ((40, 307), (40, 307), (307,)))
    residual[3] += 1000
    branch[5, 6] = torch.inf
    moments, expected = torch.zeros(2, 20, dtype=torch.float64)
    output = residual_add_moments(branch, residual, moments, bias)
    assert torch.equal(output, residual_add_moments_reference(branch, residual, expected, bias))
    torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
"""
    tangents.run_with_capability(capability, program)
