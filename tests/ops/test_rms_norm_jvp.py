"""RMSNorm and its tangent: against float64 on the CPU and in the emulator, and what callers may give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_mcore.ops import rms_norm_jvp, rms_norm_jvp_reference
from tests.cuda_emulator import operators as emulated
from tests.ops import tangents

EPS = 1e-5
X, WEIGHT = torch.zeros(3, 8), torch.zeros(8)


def exact(x, x_tangent, weight, eps):
    x, x_tangent, weight = x.double(), x_tangent.double(), weight.double()
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    r_tangent = -(r**3) * (x * x_tangent).mean(-1, keepdim=True)
    r_tangent_terms = r**3 * (x * x_tangent).abs().mean(-1, keepdim=True)
    y, y_tangent = weight * r * x, weight * (r * x_tangent + r_tangent * x)
    return tangents.Exact([y, y_tangent], [y.abs(), weight.abs() * (r * x_tangent.abs() + r_tangent_terms * x.abs())])


def draw(distribution, rows, width, dtype, weight_dtype):
    weight = (1 + 0.3 * torch.randn(width)).to(weight_dtype)
    return distribution(rows, width).to(dtype), tangents.normal(rows, width).to(dtype), weight, EPS


def test_the_formula_is_what_autograd_derives():
    x, x_tangent, weight = torch.randn(5, 47).double(), torch.randn(5, 47).double(), torch.randn(47).double()

    def rms_norm(x):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)

    expected = torch.autograd.functional.jvp(rms_norm, x, x_tangent)
    torch.testing.assert_close(exact(x, x_tangent, weight, EPS).results, list(expected))
    torch.testing.assert_close(rms_norm_jvp(x, x_tangent, weight, EPS), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("distribution", tangents.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize("width", tangents.WIDTHS)
@pytest.mark.parametrize("weight_is_float32", [False, True])
def test_error_is_at_most_twice_that_of_the_composite(distribution, dtype, width, weight_is_float32):
    torch.manual_seed(width)
    for rows in tangents.rows_of_width(width):
        runs = []
        for _ in range(tangents.DRAWS[rows]):
            inputs = draw(distribution, rows, width, dtype, torch.float32 if weight_is_float32 else dtype)
            runs.append((rms_norm_jvp(*inputs), rms_norm_jvp_reference(*inputs), exact(*inputs)))
        tangents.assert_at_most_twice_the_error(runs, (rows, width))


@pytest.mark.parametrize("dtype", tangents.DTYPES)
def test_y_is_what_the_model_s_norm_returns(dtype):
    torch.manual_seed(0)
    x, x_tangent, weight, eps = draw(tangents.normal, 64, 520, dtype, dtype)
    y, _ = rms_norm_jvp(x, x_tangent, weight, eps)
    expected = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    torch.testing.assert_close(y, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    in_half_precision = torch.finfo(dtype).bits == 16
    assert not in_half_precision or (y == expected).float().mean() > 0.99  # rounded once, from the same float32


# Widths: single elements, a part of a warp, a warp, a block. Of 1120 columns some threads have none, and of its rows
# there are more than blocks.
@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize("weight_is_float32", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 59), (97, 64), (33, 96), (13, 256), (13, 1120), (2, 2048)])
def test_the_cuda_kernel_in_the_emulator(dtype, weight_is_float32, rows, width):
    torch.manual_seed(width)
    distribution = tangents.DISTRIBUTIONS[width % 3]
    x, x_tangent, weight, eps = draw(distribution, rows, width, dtype, torch.float32 if weight_is_float32 else dtype)
    found = emulated.rms_norm_jvp(x, x_tangent, weight, eps)
    composite = rms_norm_jvp_reference(x, x_tangent, weight, eps)
    tangents.assert_at_most_twice_the_error([(found, composite, exact(x, x_tangent, weight, eps))], (rows, width))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 16400), (torch.float32, 8200)])
def test_rows_too_wide_for_registers_in_the_emulator(dtype, width):
    torch.manual_seed(0)
    inputs = draw(tangents.large_mean, 2, width, dtype, dtype)
    runs = [(emulated.rms_norm_jvp(*inputs), rms_norm_jvp_reference(*inputs), exact(*inputs))]
    tangents.assert_at_most_twice_the_error(runs, width)


@pytest.mark.parametrize("distribution", tangents.DISTRIBUTIONS)
def test_distributions_in_the_emulator(distribution):
    torch.manual_seed(0)
    runs = []
    for width in (96, 1120):
        inputs = draw(distribution, 7, width, torch.float32, torch.float32)
        runs.append((emulated.rms_norm_jvp(*inputs), rms_norm_jvp_reference(*inputs), exact(*inputs)))
    tangents.assert_at_most_twice_the_error(runs, distribution)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 90),
    probes=st.lists(st.integers(1, 3), max_size=1),
    dtype=st.sampled_from(tangents.DTYPES),
    weight_is_float32=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(tangents.LAYOUTS)] * 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_and_dtype(shape, width, probes, dtype, weight_is_float32, layouts, seed):
    torch.manual_seed(seed)
    x = tangents.strided([*shape, width], layouts[0], dtype)
    x_tangent = tangents.strided([*probes, *shape, width], layouts[1], dtype)
    weight = tangents.strided([width], layouts[2], torch.float32 if weight_is_float32 else dtype)
    found = rms_norm_jvp(x, x_tangent, weight, 0.1)
    for result, model, expected in zip(found, (x, x_tangent), exact(x, x_tangent, weight, 0.1).results, strict=True):
        assert result.is_contiguous() and result.dtype == dtype and result.shape == model.shape
        torch.testing.assert_close(result, expected.to(dtype))


@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize("operator", [rms_norm_jvp, rms_norm_jvp_reference, emulated.rms_norm_jvp])
def test_probes_are_one_tangent_after_the_other(operator, dtype):
    torch.manual_seed(0)
    x, weight, eps = torch.randn(9, 104).to(dtype), torch.randn(104), EPS
    tangents.assert_probes_are_single_tangents(
        lambda x_tangent: operator(x, x_tangent, weight, eps), [torch.randn(3, *x.shape).to(dtype)]
    )


@pytest.mark.parametrize("operator", [rms_norm_jvp, rms_norm_jvp_reference])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
def test_an_empty_input(operator, shape):
    for result in operator(torch.randn(shape), torch.randn(shape), torch.ones(shape[-1]), EPS):
        assert result.shape == shape


@pytest.mark.parametrize("operator", [rms_norm_jvp, rms_norm_jvp_reference])
@pytest.mark.parametrize("dtype", tangents.DTYPES)
def test_rows_of_zeros(operator, dtype):
    x, x_tangent, weight = torch.zeros(2, 40, dtype=dtype), torch.randn(2, 40).to(dtype), torch.full([40], 2.0)
    y, y_tangent = operator(x, x_tangent, weight, 0.25)
    assert not y.any()
    torch.testing.assert_close(y_tangent, 4 * x_tangent)


@pytest.mark.parametrize("dtype", tangents.DTYPES)
def test_what_is_not_finite_spoils_its_row_only(dtype):
    torch.manual_seed(0)
    x, x_tangent, weight = torch.randn(5, 70).to(dtype), torch.randn(5, 70).to(dtype), torch.ones(70)
    expected = rms_norm_jvp(x, x_tangent, weight, EPS)
    x[1, 3], x_tangent[3, 69] = torch.nan, torch.inf
    y, y_tangent = rms_norm_jvp(x, x_tangent, weight, EPS)
    torch.testing.assert_close((y, y_tangent), rms_norm_jvp_reference(x, x_tangent, weight, EPS), equal_nan=True)
    assert y[1].isnan().all() and y_tangent[1].isnan().all() and not y_tangent[3].isfinite().any()
    for found, unspoilt in ((y, expected[0]), (y_tangent, expected[1])):
        assert torch.equal(found[[0, 2, 4]], unspoilt[[0, 2, 4]])


def test_a_float32_weight_of_any_nan_stays_nan_in_bfloat16():
    x = torch.ones(2, 48, dtype=torch.bfloat16)
    weight = torch.ones(48)
    weight[[4, 5, 47]] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # what GPUs return for NaN
    for result in rms_norm_jvp(x, x * 3, weight, EPS):
        assert result.isnan().any(0).nonzero().flatten().tolist() == [4, 5, 47]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(dtype):
    torch.manual_seed(0)
    inputs, weight = torch.randn(2, 700, 71).to(dtype), torch.randn(71)
    first, *others = tangents.on_thread_counts(lambda: rms_norm_jvp(*inputs, weight, EPS))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    tangents.run_with_capability(
        capability,
        """
import torch
from sparsecod_mcore.ops import rms_norm_jvp, rms_norm_jvp_reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for weight in (torch.randn(307), torch.randn(307).to(dtype)):
        inputs = (*torch.randn(2, 40, 307).to(dtype), weight, 1e-5)
        torch.testing.assert_close(rms_norm_jvp(*inputs), rms_norm_jvp_reference(*inputs))
""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    operator = torch.ops.sparsecod.rms_norm_jvp.default
    torch.library.opcheck(operator, (*torch.randn(2, 2, 3, 10).to(dtype), torch.randn(10), EPS))
    transposed, probes = torch.randn(10, 3).to(dtype).mT, torch.randn(2, 10, 3).to(dtype).mT
    torch.library.opcheck(operator, (transposed, probes, torch.randn(20).to(dtype)[::2], EPS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch.compiler.reset()
    inputs, weight = torch.randn(2, 5, 12), torch.randn(12)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(x, x_tangent, weight):
        y, y_tangent = rms_norm_jvp(x * 2, x_tangent * 2, weight, EPS)
        return y + 1, y_tangent + 1

    expected = [x + 1 for x in rms_norm_jvp(*(inputs * 2), weight, EPS)]
    torch.testing.assert_close(list(compiled(*inputs, weight)), expected)


def test_backward_raises():
    for result in rms_norm_jvp(X.clone().requires_grad_(), X, WEIGHT, EPS):
        with pytest.raises(RuntimeError, match="not implemented"):
            result.sum().backward()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"x": X.int()}, "x is int32, but must be float32, bfloat16, float16 or float64"),
        ({"x": X[0, 0]}, "x has shape [], but must have shape [..., D]"),
        (
            {"x_tangent": X[:2]},
            "x_tangent has shape [2, 8], but must have x's shape [3, 8], or a number of probes before it",
        ),
        ({"x_tangent": X.expand(0, 3, 8)}, "x_tangent has 0 probes, but must have at least 1"),
        ({"x_tangent": X.half()}, "x_tangent is float16, but must have x's dtype float32"),
        ({"x_tangent": X.to("meta")}, "x_tangent is on meta, but must be on x's device cpu"),
        ({"weight": X}, "weight has shape [3, 8], but must have shape [8], x's last dimension"),
        ({"weight": WEIGHT[:5]}, "weight has shape [5], but must have shape [8], x's last dimension"),
        ({"weight": WEIGHT.half()}, "weight is float16, but must be float32 or have x's dtype float32"),
        ({"weight": WEIGHT.to("meta")}, "weight is on meta, but must be on x's device cpu"),
        ({"eps": -1.0}, "eps is -1, but must be at least 0"),
        ({"eps": float("nan")}, "eps is nan, but must be at least 0"),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    with pytest.raises(ValueError) as error:
        rms_norm_jvp(**{"x": X, "x_tangent": X, "weight": WEIGHT, "eps": EPS, **given})
    assert str(error.value) == told
