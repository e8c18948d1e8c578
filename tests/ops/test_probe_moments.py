"""Moments of Jacobian probes: against float64 on the CPU and in the emulator, and what callers may give."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecod_mcore import _C
from sparsecod_mcore.ops import NUM_PROBE_MOMENTS, ProbeMoment, probe_moments, probe_moments_reference
from tests.cuda_emulator.emulator import DTYPES, Emulator, garbage
from tests.ops import tangents

U, V = torch.zeros(2, 3, 8), torch.zeros(2, 8)
SUMS, MOMENTS = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
TOKENS_AND_PROBES = ((1, 3), (5, 2), (97, 1), (123, 2), (1025, 1))


def accumulators(u):
    probes, _, width = u.shape
    return torch.zeros(probes, width).double(), torch.zeros(probes, NUM_PROBE_MOMENTS).double()


def measure(operator, v, u):
    sums, moments = accumulators(u)
    operator(v, u, sums, moments)
    return sums, moments


def exact(v, u):
    u_PND = u.double()
    v_PND = v.double().unsqueeze(1) if v.dim() == 2 else v.double()
    per_probe = u_PND.square().sum((1, 2)), (u_PND * v_PND).sum((1, 2)), torch.full([len(u)], float(u.shape[1]))
    return u_PND.sum(1), torch.stack(per_probe, -1)


def errors(found, v, u):
    """Of sums, squared norm and product: relative to what bounds each, as terms may cancel."""
    v_PND = v.double().unsqueeze(1) if v.dim() == 2 else v.double()
    sums, moments = exact(v, u)
    of_sums = (found[0] - sums).abs() / u.double().abs().sum(1).clamp(min=1e-300)
    scale = torch.stack([moments[:, 0], (u.double() * v_PND).abs().sum((1, 2))], -1).clamp(min=1e-300)
    assert torch.equal(found[1][:, ProbeMoment.TOKENS], moments[:, ProbeMoment.TOKENS])
    return torch.stack([of_sums.max(), *((found[1] - moments).abs()[:, :2] / scale).amax(0)])


def assert_at_most_twice_the_error(runs, told):
    """Compare the worst errors over runs of (found, the composite's, v, u); one rounding to float32 is allowed."""
    error = torch.stack([errors(found, v, u) for found, _, v, u in runs]).amax(0)
    composite_error = torch.stack([errors(composite, v, u) for _, composite, v, u in runs]).amax(0)
    rounding = torch.finfo(torch.promote_types(runs[0][3].dtype, torch.float32)).eps / 2
    assert (error <= 2 * composite_error.clamp(min=rounding)).all(), f"{told}: {error} against {composite_error}"


def draw(distribution, probes, tokens, width, dtype, per_token):
    u = distribution(probes, tokens, width).to(dtype)
    return torch.randn(u.shape if per_token else (probes, width)).to(dtype), u


def test_python_and_cpp_name_the_same_moments():
    assert [moment.name for moment in ProbeMoment] == _C.PROBE_MOMENT_NAMES
    assert [int(moment) for moment in ProbeMoment] == list(range(NUM_PROBE_MOMENTS))


@pytest.mark.parametrize("distribution", tangents.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize("width", tangents.WIDTHS)
@pytest.mark.parametrize("per_token", [False, True])
def test_error_is_at_most_twice_that_of_the_composite(distribution, dtype, width, per_token):
    torch.manual_seed(width)
    for tokens, probes in TOKENS_AND_PROBES:
        if probes * tokens * width > tangents.MAX_ELEMENTS:
            continue
        runs = []
        for _ in range(tangents.DRAWS[tokens]):
            v, u = draw(distribution, probes, tokens, width, dtype, per_token)
            runs.append((measure(probe_moments, v, u), measure(probe_moments_reference, v, u), v, u))
        assert_at_most_twice_the_error(runs, (tokens, width))


def test_float64_is_summed_in_float64():
    torch.manual_seed(0)
    v, u = draw(tangents.outliers, 2, 300, 71, torch.float64, True)
    assert errors(measure(probe_moments, v, u), v, u).max() < 1e-14


def test_squares_that_all_round_one_way_are_not_added_up_in_float32():
    u = torch.full([1, 1024, 64], 100 + 1 / 16, dtype=torch.float16)
    _, moments = measure(probe_moments, u[:, 0], u)
    assert moments[0, :2].tolist() == [(100 + 1 / 16) ** 2 * 1024 * 64] * 2


# Tokens: fewer than a block loads at once, several chunks, several runs of a thread. Widths: elements, packs, tiles.
@pytest.mark.parametrize("dtype", tangents.CUDA_DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    ("probes", "tokens", "width"),
    [(1, 1, 1), (3, 5, 59), (2, 97, 96), (1, 150, 300), (1, 10, 1120), (1, 700, 8), (50, 300, 8)],
)
def test_the_cuda_kernel_in_the_emulator(dtype, per_token, probes, tokens, width):
    torch.manual_seed(width)
    v, u = draw(tangents.DISTRIBUTIONS[tokens % 3], probes, tokens, width, dtype, per_token)
    runs = [(measure(emulated, v, u), measure(probe_moments_reference, v, u), v, u)]
    assert_at_most_twice_the_error(runs, (tokens, width))


def test_the_cuda_kernel_cuts_long_inputs_into_chunks_that_sum_up():
    u = torch.ones(1, 4200, 8)
    sums, moments = measure(emulated, torch.full([1, 8], 0.5), u)
    assert torch.equal(sums, torch.full([1, 8], 4200.0).double())
    assert moments.tolist() == [[8 * 4200, 4 * 4200, 4200]]


def emulated(v, u, sums, moments, by=None):
    """The CUDA launcher on copies, whose results are copied back."""
    emulator, doubles = by or Emulator(), ctypes.c_int64()
    sizes = [ctypes.c_int64(size) for size in u.shape]
    assert emulator.library.sparsecod_probe_moments_workspace(DTYPES[u.dtype], *sizes, ctypes.byref(doubles)) == 0
    workspace = garbage([doubles.value], torch.float64)
    arguments = [v, u, sums, moments, workspace, u.dtype, v.dim() == 3, *u.shape]
    found = emulator.launch("sparsecod_probe_moments", arguments, [sums, moments, workspace])
    sums.copy_(found[0])
    moments.copy_(found[1])


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 90)),
    dtype=st.sampled_from(tangents.DTYPES),
    layouts=st.tuples(st.sampled_from(tangents.LAYOUTS), st.sampled_from(tangents.LAYOUTS)),
    per_token=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_and_dtype(shape, dtype, layouts, per_token, seed):
    torch.manual_seed(seed)
    u = tangents.strided(shape, layouts[0], dtype)
    v = tangents.strided(shape if per_token else (shape[0], shape[2]), layouts[1], dtype)
    assert errors(measure(probe_moments, v, u), v, u).max() < 1e-6


@pytest.mark.parametrize("operator", [probe_moments, probe_moments_reference, emulated])
def test_calls_add_to_what_is_there(operator):
    torch.manual_seed(0)
    v, u = torch.randn(2, 16), torch.randn(2, 300, 16)
    whole, parts = measure(probe_moments, v, u), accumulators(u)
    for part in u.split(110, dim=1):
        operator(v, part.contiguous(), *parts)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", [probe_moments, probe_moments_reference])
def test_a_shared_v_is_the_same_as_one_repeated_for_every_token(operator):
    torch.manual_seed(0)
    v, u = torch.randn(2, 40), torch.randn(2, 33, 40)
    repeated = v.unsqueeze(1).expand_as(u)
    torch.testing.assert_close(measure(operator, v, u), measure(operator, repeated, u), rtol=1e-5, atol=1e-5)


def test_the_mean_over_probes_is_the_norm_of_the_jacobian():
    torch.manual_seed(0)
    probes, width = 4000, 6
    jacobian = torch.eye(width) + torch.randn(width, width)
    v = torch.randn(probes, width)
    u = (v @ (jacobian - torch.eye(width)).T).unsqueeze(1).repeat(1, 3, 1)
    sums, moments = measure(probe_moments, v, u)
    tokens = moments[:, ProbeMoment.TOKENS]
    squared_norm = (jacobian - torch.eye(width)).square().sum().double()
    found = (sums / tokens[:, None]).square().sum(-1).mean()
    torch.testing.assert_close(found, squared_norm, rtol=0.1, atol=0)
    torch.testing.assert_close((moments[:, ProbeMoment.SQUARED_NORM] / tokens).mean(), found)
    trace = width + (moments[:, ProbeMoment.PRODUCT] / tokens).mean()
    torch.testing.assert_close(trace, jacobian.trace().double(), rtol=0, atol=0.5)


@pytest.mark.parametrize("operator", [probe_moments, probe_moments_reference])
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_an_empty_input_adds_nothing(operator, shape, per_token):
    u = torch.randn(shape)
    assert not any(x.any() for x in measure(operator, u if per_token else u.new_zeros(shape[0], shape[2]), u))


@pytest.mark.parametrize("dtype", tangents.DTYPES)
def test_what_is_not_finite_spoils_its_column_and_its_probe_only(dtype):
    v, u = torch.ones(3, 50, dtype=dtype), torch.ones(3, 20, 50, dtype=dtype)
    u[1, 7, 33] = torch.nan
    sums, moments = measure(probe_moments, v, u)
    assert sums.isnan().nonzero().tolist() == [[1, 33]]
    assert moments[1, :2].isnan().all() and moments[[0, 2]].tolist() == [[1000, 1000, 20]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(dtype, per_token):
    torch.manual_seed(0)
    v, u = draw(tangents.normal, 2, 900, 71, dtype, per_token)
    first, *others = tangents.on_thread_counts(lambda: measure(probe_moments, v, u))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    tangents.run_with_capability(
        capability,
        """
import torch
from sparsecod_mcore.ops import probe_moments, probe_moments_reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for v_shape in ((2, 307), (2, 40, 307)):
        v, u = torch.randn(v_shape).to(dtype), torch.randn(2, 40, 307).to(dtype)
        found, expected = [[torch.zeros(2, n).double() for n in (307, 3)] for _ in range(2)]
        probe_moments(v, u, *found)
        probe_moments_reference(v, u, *expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck(dtype, per_token):
    v, u = draw(tangents.normal, 2, 5, 12, dtype, per_token)
    operator = torch.ops.sparsecod.probe_moments.default
    torch.library.opcheck(operator, (v, u, *accumulators(u)))
    transposed = u.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(operator, (v, transposed, *accumulators(u)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_into_rows_of_buffers(dynamic):
    torch.compiler.reset()
    v, u = torch.randn(2, 12), torch.randn(2, 5, 12)
    sums, moments = torch.zeros(3, 2, 12).double(), torch.zeros(3, 2, 3).double()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(v, u, sums, moments):
        probe_moments(v * 2, u * 2, sums[1], moments[1])
        return sums[1] + 1

    expected = measure(probe_moments, v * 2, u * 2)
    for calls in (1, 2):
        torch.testing.assert_close(compiled(v, u, sums, moments), calls * expected[0] + 1)
        torch.testing.assert_close((sums[1], moments[1]), (calls * expected[0], calls * expected[1]))
    assert not sums[[0, 2]].any() and not moments[[0, 2]].any()


def test_no_gradient_reaches_the_accumulators():
    u = torch.randn(2, 5, 12, requires_grad=True)
    sums, moments = measure(probe_moments, u[:, 0], u)
    assert not sums.requires_grad and not moments.requires_grad
    assert torch.equal(sums, measure(probe_moments, u[:, 0].detach(), u.detach())[0])
    reference = measure(probe_moments_reference, u[:, 0], u)
    assert not any(x.requires_grad for x in reference)


@pytest.mark.parametrize("which", [0, 1])
def test_autograd_sees_that_the_accumulators_change(which):
    v, u = torch.randn(2, 12), torch.randn(2, 5, 12)
    changed = accumulators(u)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    saved_for_backward = (scale * changed[which]).sum()
    probe_moments(v, u, *changed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved_for_backward.backward()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"u": U.int()}, "u is int32, but must be float32, bfloat16, float16 or float64"),
        ({"u": U[0]}, "u has shape [3, 8], but must have shape [P, N, D]"),
        ({"v": V[:1]}, "v has shape [1, 8], but must have shape [P, D] = [2, 8], or [P, N, D] = [2, 3, 8]"),
        ({"v": U[:, :2]}, "v has shape [2, 2, 8], but must have shape [P, D] = [2, 8], or [P, N, D] = [2, 3, 8]"),
        ({"v": V.half()}, "v is float16, but must have u's dtype float32"),
        ({"v": V.to("meta")}, "v is on meta, but must be on u's device cpu"),
        ({"sums": SUMS[:1]}, "sums has shape [1, 8], but must have shape [P, D] = [2, 8]"),
        ({"sums": SUMS.float()}, "sums is float32, but must be float64"),
        ({"sums": SUMS.T.contiguous().T}, "sums has stride [1, 2], but must be contiguous"),
        ({"sums": SUMS.to("meta")}, "sums is on meta, but must be on u's device cpu"),
        ({"moments": MOMENTS[:, :2]}, "moments has shape [2, 2], but must have shape [P, 3] = [2, 3]"),
        ({"moments": MOMENTS[0]}, "moments has shape [3], but must have shape [P, 3] = [2, 3]"),
        ({"moments": MOMENTS.clone().requires_grad_()}, "moments requires a gradient, but must not"),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    with pytest.raises(ValueError) as error:
        probe_moments(**{"v": V, "u": U, "sums": SUMS, "moments": MOMENTS, **given})
    assert str(error.value) == told
