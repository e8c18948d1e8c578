"""Attention's tangents along directions that all tokens share, against the same tangents written out, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecod_mcore.ops import SharedTangents, flash_attention_jvp
from tests.ops import tangents
from tests.ops.test_flash_attention_jvp import DTYPES, RESULTS, Results, Shape, errors, exact

OPERATOR = torch.ops.sparsecod.flash_attention_jvp_shared.default
SHAPES = [
    Shape(1, 1, 64, heads=2, kv_heads=2),
    Shape(5, 5, 32, heads=4),
    Shape(97, 97, 59, heads=4, kv_heads=2, batch=2),
    Shape(193, 193, 40, causal=False, batch=2),
    Shape(260, 260, 136),
]

Inputs = tuple[list[Tensor], SharedTangents, list[Tensor]]


def draw(shape: Shape, dtype: torch.dtype, shared_probes: int, probes: int) -> Inputs:
    """q, k and v, shared tangents, and others."""
    q, k, v, *_ = shape.draw(dtype)
    real = torch.promote_types(dtype, torch.float32)
    shared = SharedTangents(
        *(torch.randn(shared_probes, *x.shape[1:]).to(dtype) for x in (q, k, v[:, :, 0])),
        token_scale=torch.rand(shape.batch, shape.keys, dtype=real) + 0.5,
        token_rate=torch.randn(shared_probes, shape.batch, shape.keys, dtype=real),
    )
    return [q, k, v], shared, [torch.randn(probes, *x.shape).to(dtype) for x in (q, k, v)]


def expected_of(inputs: Inputs, causal: bool, scale: float | None = None) -> Results:
    primals, shared, others = inputs
    written_out = SharedTangents(*(x.double() for x in shared)).of(*(x.double() for x in primals))
    all_tangents = [torch.cat([x, y.double()]) for x, y in zip(written_out, others, strict=True)]
    return exact([*primals, *all_tangents], causal, scale)


def run(inputs: Inputs, causal: bool, scale: float | None = None) -> Results:
    primals, shared, others = inputs
    return flash_attention_jvp(*primals, *others, scale, causal, shared)


@pytest.mark.parametrize(("shared_probes", "probes"), [(1, 0), (4, 1), (2, 3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float64_it_is_exact(shape, shared_probes, probes):
    torch.manual_seed(0)
    inputs = draw(shape, torch.float64, shared_probes, probes)
    assert errors(run(inputs, shape.causal), expected_of(inputs, shape.causal)).max() < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_accurate_as_tangents_that_are_written_out(shape, dtype):
    torch.manual_seed(1)
    inputs = draw(shape, dtype, 3, 1)
    primals, shared, others = inputs
    expected = expected_of(inputs, shape.causal)
    written_out = shared.of(*primals)
    all_tangents = [torch.cat(pair) for pair in zip(written_out, others, strict=True)]
    model = flash_attention_jvp(*primals, *all_tangents, causal=shape.causal)
    found = run(inputs, shape.causal)
    assert [x.dtype for x in found] == [dtype, dtype, torch.float32]
    error, allowed = errors(found, expected), 2 * errors(model, expected) + torch.finfo(torch.float32).eps
    assert (error <= allowed).all(), dict(zip(RESULTS, zip(error, allowed, strict=True), strict=True))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_layout(data):
    shape = Shape(
        queries := data.draw(st.integers(1, 120)),
        queries,
        data.draw(st.integers(1, 70)),
        heads=(kv_heads := data.draw(st.integers(1, 3))) * data.draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        batch=data.draw(st.integers(1, 3)),
    )
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    causal, scale = data.draw(st.booleans()), data.draw(st.sampled_from((None, -0.3, 0.0)))
    primals, shared, others = draw(shape, torch.float64, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2)))

    def elsewhere(x: Tensor) -> Tensor:
        """The same numbers, otherwise in memory."""
        order = data.draw(st.permutations(range(x.dim())))
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])

    moved = [elsewhere(x) for x in primals], SharedTangents(*map(elsewhere, shared)), [elsewhere(x) for x in others]
    found, expected = run(moved, causal, scale), expected_of((primals, shared, others), causal, scale)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_tokens_to_come_are_not_seen():
    torch.manual_seed(2)
    inputs = draw(Shape(200, 200, 16, heads=2), torch.float32, 2, 1)
    before = run(inputs, True)
    primals, shared, others = inputs
    for x in (*primals[1:], *others[1:], shared.k_offset):
        x[..., 151:, :] = torch.nan
    shared.token_scale[:, 151:] = shared.token_rate[..., 151:] = torch.nan
    after = run(inputs, True)
    for x, y in zip(after[:2], before[:2], strict=True):
        assert torch.equal(x[..., :128, :], y[..., :128, :])  # blocks of queries that no such token is in
        assert x[..., 151:, :].isnan().all()


def test_the_same_bits_for_any_number_of_threads():
    torch.manual_seed(3)
    inputs = draw(Shape(200, 200, 64, heads=4, kv_heads=2), torch.bfloat16, 2, 1)
    first, *others = tangents.on_thread_counts(lambda: run(inputs, True))
    assert all(torch.equal(x, y) for other in others for x, y in zip(other, first, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_computes_the_same(capability):
    program = """
import torch
from tests.ops.test_flash_attention_jvp_shared import Shape, draw, errors, expected_of, run
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    inputs = draw(Shape(130, 130, 40, heads=4, kv_heads=2), dtype, 2, 1)
    error = errors(run(inputs, True), expected_of(inputs, True)).max()
    assert error < {torch.float64: 1e-14, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps), (dtype, error)
"""
    tangents.run_with_capability(capability, program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_there_is_no_kernel_tangents_are_written_out(dtype, monkeypatch):
    """What CUDA tensors are given to."""
    torch.manual_seed(4)
    inputs = draw(SHAPES[2], dtype, 2, 1)
    found = run(inputs, True)
    monkeypatch.setitem(flash_attention_jvp.__globals__, "_WITH_SHARED_KERNEL", ())
    assert errors(found, run(inputs, True)).max() < 4 * torch.finfo(dtype).eps
    primals, shared, others = inputs
    with pytest.raises(ValueError, match=r"^token_scale has shape \[1, 97\], but must have k's batch and keys"):
        run((primals, shared._replace(token_scale=shared.token_scale[:1]), others), True)


X = torch.zeros(2, 4, 3, 8)
FITTING = {
    "q_offset": torch.zeros(5, 4, 3, 8),
    "k_offset": torch.zeros(5, 4, 3, 8),
    "v_offset": torch.zeros(5, 4, 8),
    "token_scale": torch.zeros(2, 3),
    "token_rate": torch.zeros(5, 2, 3),
}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"q": X[:, :, :2]}, "q has 2 queries, but must have as many as k's 3 keys"),
        ({"q_offset": X[:0]}, "q_offset has shape [0, 4, 3, 8], but must have shape [N, 4, 3, 8] with N > 0"),
        (
            {"q_offset": X[:, :2]},
            "q_offset has shape [2, 2, 3, 8], but must have probes and q's shape of one sequence [2, 4, 3, 8]",
        ),
        (
            {"k_offset": X},
            "k_offset has shape [2, 4, 3, 8], but must have q_offset's probes and k's shape of one sequence "
            "[5, 4, 3, 8]",
        ),
        (
            {"v_offset": X},
            "v_offset has shape [2, 4, 3, 8], but must have q_offset's probes and v's shape of one key [5, 4, 8]",
        ),
        ({"v_offset": FITTING["v_offset"].half()}, "v_offset is float16, but must have q's dtype float32"),
        ({"token_scale": X[0, 0]}, "token_scale has shape [3, 8], but must have k's batch and keys [2, 3]"),
        ({"token_scale": FITTING["token_scale"].double()}, "token_scale is float64, but must be float32"),
        ({"token_scale": FITTING["token_scale"].to("meta")}, "token_scale is on meta, but must be on q's device cpu"),
        (
            {"token_rate": FITTING["token_rate"][:1]},
            "token_rate has shape [1, 2, 3], but must have q_offset's probes and k's batch and keys [5, 2, 3]",
        ),
        (
            dict.fromkeys(("q_tangent", "k_tangent", "v_tangent"), X),
            "q_tangent has shape [2, 4, 3, 8], but must have a number of probes before q's shape [2, 4, 3, 8]",
        ),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    names = ("q", "k", "v")
    arguments = dict.fromkeys(names, X) | {f"{name}_tangent": X[None] for name in names} | FITTING | given
    if "q" in given:
        arguments["q_tangent"] = given["q"][None]
    shared = SharedTangents(**{name: arguments.pop(name) for name in FITTING})
    with pytest.raises(ValueError) as error:
        flash_attention_jvp(**arguments, shared=shared)
    assert str(error.value) == told


@pytest.mark.parametrize("probes", [0, 2])
def test_opcheck(probes):
    primals, shared, others = draw(Shape(7, 7, 16, heads=2), torch.float32, 2, probes)
    torch.library.opcheck(OPERATOR, (*primals, *shared, *others, None, True))


def test_no_sequences():
    inputs = draw(Shape(5, 5, 8, batch=0), torch.float32, 2, 1)
    assert run(inputs, True)[1].shape == (3, 0, 1, 5, 8)
