"""SwiGLU and its tangent: against float64 on the CPU and in the emulator, and what callers may give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_mcore.ops import swiglu_jvp, swiglu_jvp_reference
from tests.cuda_emulator import operators as emulated
from tests.ops import tangents

X = torch.zeros(3, 8)


def exact(gate_up, gate_up_tangent):
    a, b = gate_up.double().chunk(2, -1)
    a_tangent, b_tangent = gate_up_tangent.double().chunk(2, -1)
    s = a.sigmoid()
    y, terms = a * s * b, (s * a_tangent * b, a * s * (1 - s) * a_tangent * b, a * s * b_tangent)
    return tangents.Exact([y, sum(terms)], [y.abs(), sum(term.abs() for term in terms)])


def draw(distribution, rows, width, dtype):
    return distribution(rows, 2 * width).to(dtype), tangents.normal(rows, 2 * width).to(dtype)


def test_the_formula_is_what_autograd_derives():
    def swiglu(x):
        a, b = x.chunk(2, -1)
        return torch.nn.functional.silu(a) * b

    inputs = torch.randn(2, 5, 14, dtype=torch.float64)
    expected = torch.autograd.functional.jvp(swiglu, *inputs)
    torch.testing.assert_close(exact(*inputs).results, list(expected))
    torch.testing.assert_close(swiglu_jvp(*inputs), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("distribution", tangents.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize("width", tangents.WIDTHS)
def test_error_is_at_most_twice_that_of_the_composite(distribution, dtype, width):
    torch.manual_seed(width)
    for rows in tangents.rows_of_width(width):
        runs = []
        for _ in range(tangents.DRAWS[rows]):
            inputs = draw(distribution, rows, width, dtype)
            runs.append((swiglu_jvp(*inputs), swiglu_jvp_reference(*inputs), exact(*inputs)))
        tangents.assert_at_most_twice_the_error(runs, (rows, width))


@pytest.mark.parametrize("distribution", tangents.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 59), (3, 96), (97, 8), (2, 1120)])
def test_the_cuda_kernel_in_the_emulator(distribution, dtype, rows, width):
    torch.manual_seed(width)
    gate_up, tangent = draw(distribution, rows, width, dtype)
    found = emulated.swiglu_jvp(gate_up, tangent)
    composite = swiglu_jvp_reference(gate_up, tangent)
    tangents.assert_at_most_twice_the_error([(found, composite, exact(gate_up, tangent))], (rows, width))


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 90),
    probes=st.lists(st.integers(1, 3), max_size=1),
    dtype=st.sampled_from(tangents.DTYPES),
    layouts=st.tuples(st.sampled_from(tangents.LAYOUTS), st.sampled_from(tangents.LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_and_dtype(shape, width, probes, dtype, layouts, seed):
    torch.manual_seed(seed)
    shapes = [[*shape, 2 * width], [*probes, *shape, 2 * width]]
    inputs = [tangents.strided(*each, dtype) for each in zip(shapes, layouts, strict=True)]
    found = swiglu_jvp(*inputs)
    for result, like, expected in zip(found, inputs, exact(*inputs).results, strict=True):
        assert result.is_contiguous() and result.dtype == dtype and result.shape == (*like.shape[:-1], width)
        torch.testing.assert_close(result, expected.to(dtype))


@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize("operator", [swiglu_jvp, swiglu_jvp_reference, emulated.swiglu_jvp])
def test_probes_are_one_tangent_after_the_other(operator, dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(9, 2 * 52).to(dtype)
    tangents.assert_probes_are_single_tangents(
        lambda tangent: operator(gate_up, tangent), [torch.randn(3, *gate_up.shape).to(dtype)]
    )


@pytest.mark.parametrize("operator", [swiglu_jvp, swiglu_jvp_reference])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
def test_an_empty_input(operator, shape):
    for result in operator(torch.randn(shape), torch.randn(shape)):
        assert result.shape == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("dtype", tangents.DTYPES)
def test_gates_that_saturate_or_are_not_finite(dtype):
    gate = torch.tensor([-torch.inf, -3e4, -200, -90, -88, 0, 88, 200, 3e4, torch.inf, torch.nan], dtype=dtype)
    gate_up = torch.cat([gate, torch.full_like(gate, 2)]).repeat(5, 1)
    found, expected = swiglu_jvp(gate_up, gate_up), swiglu_jvp_reference(gate_up, gate_up)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0][0, 5:-2].tolist() == [0, *(2 * gate[6:-2]).tolist()]  # silu is the identity there, and 0 at 0
    assert found[0][:, -1].isnan().all() and found[1][:, -1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(dtype):
    torch.manual_seed(0)
    inputs = torch.randn(2, 700, 142).to(dtype)
    first, *others = tangents.on_thread_counts(lambda: swiglu_jvp(*inputs))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    tangents.run_with_capability(
        capability,
        """
import torch
from sparsecod_mcore.ops import swiglu_jvp, swiglu_jvp_reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    inputs = torch.randn(2, 40, 614).mul(4).to(dtype)
    torch.testing.assert_close(swiglu_jvp(*inputs), swiglu_jvp_reference(*inputs))
""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    operator = torch.ops.sparsecod.swiglu_jvp.default
    torch.library.opcheck(operator, tuple(torch.randn(2, 2, 3, 10).to(dtype)))
    torch.library.opcheck(operator, (torch.randn(10, 3).to(dtype).mT, torch.randn(2, 10, 3).to(dtype).mT))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch.compiler.reset()
    inputs = torch.randn(2, 5, 12)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(gate_up, tangent):
        y, y_tangent = swiglu_jvp(gate_up * 2, tangent * 2)
        return y + 1, y_tangent + 1

    expected = [x + 1 for x in swiglu_jvp(*(inputs * 2))]
    torch.testing.assert_close(list(compiled(*inputs)), expected)


def test_backward_raises():
    y, y_tangent = swiglu_jvp(X.clone().requires_grad_(), X)
    for result in (y, y_tangent):
        with pytest.raises(RuntimeError, match="not implemented"):
            result.sum().backward()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gate_up": X.int()}, "gate_up is int32, but must be float32, bfloat16, float16 or float64"),
        ({"gate_up": X[0, 0]}, "gate_up has shape [], but must have shape [..., 2 F]"),
        ({"gate_up": X[:, :7]}, "gate_up has shape [3, 7], but must have shape [..., 2 F]"),
        (
            {"gate_up_tangent": X[:2]},
            "gate_up_tangent has shape [2, 8], but must have gate_up's shape [3, 8], or a number of probes before it",
        ),
        ({"gate_up_tangent": X.expand(0, 3, 8)}, "gate_up_tangent has 0 probes, but must have at least 1"),
        ({"gate_up_tangent": X.half()}, "gate_up_tangent is float16, but must have gate_up's dtype float32"),
        ({"gate_up_tangent": X.to("meta")}, "gate_up_tangent is on meta, but must be on gate_up's device cpu"),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    with pytest.raises(ValueError) as error:
        swiglu_jvp(**{"gate_up": X, "gate_up_tangent": X, **given})
    assert str(error.value) == told
