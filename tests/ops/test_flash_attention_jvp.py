"""Attention's tangent against torch.func.jvp in float64: on CPU, and its CUDA kernels in the emulator.

The accuracy rule compares with plain PyTorch in the inputs' own dtype: softmax(scale q k^T) v differentiated by
torch.func.jvp, every intermediate rounded to that dtype. `flash_attention_jvp_reference` computes in float32 inside and
is as accurate as 16-bit results can be; the CPU kernel is held to twice its error as well, which the CUDA kernels,
whose weights are rounded for the tensor cores, cannot be.
"""

import dataclasses
import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecod_mcore.ops import flash_attention_jvp, flash_attention_jvp_reference
from tests.cuda_emulator import operators as emulated
from tests.cuda_emulator.emulator import LaunchError
from tests.ops import tangents

OPERATOR = torch.ops.sparsecod.flash_attention_jvp.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = ("output", "output tangent", "log-sum-exp")
ROUNDING = torch.finfo(torch.float32).eps / 2

Results = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    queries: int
    keys: int
    head_dim: int
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    causal: bool = True

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and their tangents."""
        q, kv = (self.heads, self.queries, self.head_dim), (self.kv_heads, self.keys, self.head_dim)
        return [torch.randn(self.batch, *sizes).to(dtype) for sizes in (q, kv, kv, q, kv, kv)]


def composite(tensors: list[Tensor], causal: bool = True, scale: float | None = None) -> Results:
    """Plain attention, differentiated by PyTorch, in the dtype of `tensors`."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
            scores = scores.masked_fill(unseen, -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    (output, log_sum_exp), (output_tangent, _) = torch.func.jvp(attention, tuple(tensors[:3]), tuple(tensors[3:]))
    return output, output_tangent, log_sum_exp


def exact(tensors: list[Tensor], causal: bool = True, scale: float | None = None) -> Results:
    """Attention in float64; tangents may have probes in front."""
    primals, tangents = [x.double() for x in tensors[:3]], [x.double() for x in tensors[3:]]
    if tangents[0].dim() == 4:
        return composite([*primals, *tangents], causal, scale)
    outputs, output_tangents, log_sum_exps = zip(
        *(composite([*primals, *probe], causal, scale) for probe in zip(*tangents, strict=True)), strict=True
    )
    return outputs[0], torch.stack(output_tangents), log_sum_exps[0]


def errors(found: Results, expected: Results) -> Tensor:
    """Root mean square error of each result, relative to its root mean square."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(x.double() - y).norm() / y.norm() for x, y in pairs])


def assert_accurate(
    found: Results, tensors: list[Tensor], causal: bool = True, scale: float | None = None, model: Results | None = None
) -> None:
    """Apply the accuracy rule; `model` is what plain PyTorch gives."""
    expected = exact(tensors, causal, scale)
    model = composite(tensors, causal, scale) if model is None else model
    # Where scores overflow float16, plain PyTorch gives NaN; ours must be finite all the same.
    error, allowed = errors(found, expected), 2 * errors(model, expected).nan_to_num(torch.inf) + ROUNDING
    worse = [f"{RESULTS[i]}: {error[i]:.1e} > {allowed[i]:.1e}" for i in range(3) if not error[i] <= allowed[i]]
    assert not worse, worse


def huge_scores(tensors: list[Tensor]) -> list[Tensor]:
    """Logits of some thousands, of either sign, that differ little: where every query feels their rounding."""
    q, k, *rest = tensors
    return [q * 64, k[:, :, :1] * 16 + k / 64, *rest]


def keys_with_a_common_part(tensors: list[Tensor]) -> list[Tensor]:
    """All scores of a query, and all their tangents, share what is hundreds of times their differences."""
    q, k, v, q_tangent, k_tangent, v_tangent = tensors
    return [q, k * 0.25 + 20, v, q_tangent, k_tangent * 0.25 - 10, v_tangent]


def outliers(tensors: list[Tensor]) -> list[Tensor]:
    for x in tensors:
        x[:, :, x.shape[2] // 2, 0] = 50
    return tensors


DISTRIBUTIONS = (lambda tensors: tensors, huge_scores, keys_with_a_common_part, outliers)
NAMES = ("normal", "huge_scores", "keys_with_a_common_part", "outliers")

MIN_ELEMENTS = 400 * 64  # of outputs: few may round well or badly by chance
CPU_SHAPES = [
    Shape(1, 1, 64, heads=2, kv_heads=2),
    Shape(5, 5, 32, heads=4),
    Shape(97, 97, 59, heads=4, kv_heads=2),
    Shape(123, 300, 80),
    Shape(96, 96, 136, heads=2),
    Shape(193, 145, 40, causal=False, batch=2),
    Shape(1025, 1025, 64),
    Shape(1, 70, 256, heads=2, kv_heads=2),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu_error_is_at_most_twice_that_of_the_composite(shape, dtype, distribution):
    torch.manual_seed(shape.queries)
    elements = shape.batch * shape.heads * shape.queries * shape.head_dim
    shape = dataclasses.replace(shape, batch=shape.batch * -(-MIN_ELEMENTS // elements))
    tensors = distribution(shape.draw(dtype))
    found = flash_attention_jvp(*tensors, causal=shape.causal)
    assert_accurate(found, tensors, shape.causal)
    reference = flash_attention_jvp_reference(*tensors, causal=shape.causal)
    assert_accurate(found, tensors, shape.causal, model=reference)


@pytest.mark.parametrize("shape", CPU_SHAPES[:-2], ids=str)
def test_cpu_in_float64_is_exact(shape):
    torch.manual_seed(0)
    tensors = shape.draw(torch.float64)
    for operator in (flash_attention_jvp, flash_attention_jvp_reference):
        found = operator(*tensors, causal=shape.causal)
        assert all(x.dtype == torch.float64 for x in found)
        assert errors(found, exact(tensors, shape.causal)).max() < 1e-14


EMULATED_SHAPES = [
    Shape(1, 1, 32),
    Shape(5, 5, 128, heads=2, kv_heads=2),
    Shape(97, 97, 64, heads=3),
    Shape(33, 97, 40, heads=4, kv_heads=2),
    Shape(65, 66, 32, causal=False, batch=2),
    Shape(70, 70, 80),
    Shape(31, 33, 96, causal=False),
    Shape(67, 70, 128),
    Shape(20, 35, 136),
    Shape(34, 34, 256),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EMULATED_SHAPES, ids=str)
def test_cuda_error_is_at_most_twice_that_of_the_composite(shape, dtype):
    torch.manual_seed(shape.queries)
    tensors = shape.draw(dtype)
    assert_accurate(emulated.flash_attention_jvp(*tensors, causal=shape.causal), tensors, shape.causal)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS[1:], ids=NAMES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_on_distributions_that_are_hard(dtype, distribution):
    torch.manual_seed(1)
    shape = Shape(40, 75, 64, heads=2)
    tensors = distribution(shape.draw(dtype))
    assert_accurate(emulated.flash_attention_jvp(*tensors, causal=shape.causal), tensors, shape.causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_takes_megatrons_layout_as_it_is(dtype):
    torch.manual_seed(2)
    tensors = Shape(35, 35, 32, heads=4, kv_heads=2, batch=2).draw(dtype)
    expected = emulated.flash_attention_jvp(*tensors)
    for x, y in zip(emulated.flash_attention_jvp(*tensors, order=(2, 0, 1, 3)), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_scales_of_either_sign_and_none(dtype):
    torch.manual_seed(3)
    tensors = Shape(17, 17, 32).draw(dtype)
    for scale in (-0.3, 0.0, 1.0):
        assert_accurate(emulated.flash_attention_jvp(*tensors, scale=scale), tensors, scale=scale)


def test_cuda_work_is_the_same_in_sections_that_fit_the_cache():
    """So many keys that each head is a section of its own."""
    torch.manual_seed(4)
    tensors = Shape(3, 16_500, 32, heads=2, kv_heads=2).draw(torch.float32)
    assert_accurate(emulated.flash_attention_jvp(*tensors), tensors)


@pytest.mark.parametrize("head_dim", [24, 36, 264])
def test_cuda_launcher_refuses_head_sizes_it_has_no_kernel_for(head_dim):
    with pytest.raises(LaunchError, match=r"error 1\)"):
        emulated.flash_attention_jvp(*Shape(2, 2, head_dim).draw(torch.bfloat16))


def test_cpu_scales_of_either_sign_and_none():
    torch.manual_seed(5)
    tensors = Shape(50, 60, 24).draw(torch.float32)
    for scale in (-0.3, 0.0, 2.0):
        for operator in (flash_attention_jvp, flash_attention_jvp_reference):
            assert_accurate(operator(*tensors, scale), tensors, scale=scale)


def test_weights_far_below_the_largest_vanish_rather_than_wrap():
    """Logits that differ by more than the exponents of float32 span."""
    q = torch.full((1, 1, 1, 8), 1e3)
    k = torch.zeros(1, 1, 60, 8)
    k[..., 1::2, :] = -1.0
    k[..., 50, :] = 1.0
    v = torch.arange(60.0).view(1, 1, 60, 1).expand(1, 1, 60, 8)
    output, output_tangent, log_sum_exp = flash_attention_jvp(q, k, v, q, k, v, 1.0, False)
    assert (output == 50).all() and (output_tangent == 50).all() and log_sum_exp.item() == 8e3


def test_a_later_block_of_queries_sees_earlier_keys_only():
    torch.manual_seed(6)
    tensors = Shape(200, 230, 16, heads=2).draw(torch.float32)
    before = flash_attention_jvp(*tensors)
    for x in (tensors[1], tensors[2], tensors[4], tensors[5]):
        x[:, :, 151:] = torch.nan  # keys that queries from 121 on see
    after = flash_attention_jvp(*tensors)
    for x, y in zip(after, before, strict=True):
        assert torch.equal(x[:, :, :96], y[:, :, :96])
        assert x[:, :, 121:].isnan().all()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_probes_are_one_tangent_after_the_other(dtype):
    torch.manual_seed(9)
    primals = Shape(35, 70, 40, heads=4, kv_heads=2).draw(dtype)[:3]
    # [P, T, B, H, D] in memory, as Megatron's layout gives them
    probes = [torch.randn(3, *x.permute(2, 0, 1, 3).shape).to(dtype).permute(0, 2, 3, 1, 4) for x in primals]
    kernels = [flash_attention_jvp] if dtype == torch.float64 else [flash_attention_jvp, emulated.flash_attention_jvp]
    for kernel in kernels:
        tangents.assert_probes_are_single_tangents(functools.partial(kernel, *primals), probes)
    found, expected = flash_attention_jvp_reference(*primals, *probes), exact([*primals, *probes])
    assert errors(found, expected).max() < 4 * torch.finfo(dtype).eps


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_layout_and_dtype_on_cpu(data):
    dtype = data.draw(st.sampled_from((*DTYPES, torch.float64)))
    causal = data.draw(st.booleans())
    queries = data.draw(st.integers(1, 110))
    keys = data.draw(st.integers(queries if causal else 1, 120))
    batch, kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    head_dim = data.draw(st.integers(1, 70))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))

    probes = data.draw(st.lists(st.integers(1, 3), max_size=1))

    def draw_tensor(*sizes: int) -> Tensor:
        order = data.draw(st.permutations(range(len(sizes))))
        step = data.draw(st.integers(1, 2))
        stored = torch.randn(*(sizes[i] for i in order[:-1]), sizes[order[-1]] * step).to(dtype)[..., ::step]
        return stored.permute([order.index(i) for i in range(len(sizes))])

    q, kv = (batch, group * kv_heads, queries, head_dim), (batch, kv_heads, keys, head_dim)
    tensors = [draw_tensor(*sizes) for sizes in (q, kv, kv)] + [draw_tensor(*probes, *sizes) for sizes in (q, kv, kv)]
    found, expected = flash_attention_jvp(*tensors, causal=causal), exact(tensors, causal)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * 4)
    same = flash_attention_jvp(*(x.contiguous() for x in tensors), causal=causal)
    assert all(torch.equal(x, y) for x, y in zip(found, same, strict=True))


def test_results_lie_in_memory_as_queries_do():
    stored = torch.randn(7, 2, 3, 16)  # [T, B, H, D]
    q = stored.permute(1, 2, 0, 3)
    output, output_tangent, log_sum_exp = flash_attention_jvp(q, q, q, q, q, q)
    assert output.stride() == output_tangent.stride() == q.stride()
    assert log_sum_exp.is_contiguous()
    sliced = torch.randn(7, 2, 3, 48).permute(1, 2, 0, 3)[..., :16]
    assert flash_attention_jvp(*[sliced] * 6)[0].stride() == q.stride()


def test_the_same_bits_from_run_to_run_and_for_any_number_of_threads():
    torch.manual_seed(7)
    tensors = Shape(200, 200, 64, heads=4, kv_heads=2).draw(torch.bfloat16)
    first, *others = tangents.on_thread_counts(lambda: flash_attention_jvp(*tensors))
    assert all(torch.equal(x, y) for other in others for x, y in zip(other, first, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_computes_the_same(capability):
    program = """
import torch
from sparsecod_mcore.ops import flash_attention_jvp, flash_attention_jvp_reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    tensors = [torch.randn(1, 2, n, 40).to(dtype) for n in (130, 150, 150) * 2]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    for x, y in zip(flash_attention_jvp(*tensors), flash_attention_jvp_reference(*tensors)):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
"""
    tangents.run_with_capability(capability, program)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"heads": 0}])
def test_no_queries(empty):
    tensors = Shape(**{"queries": 3, "keys": 5, "head_dim": 8, "heads": 2, **empty}).draw(torch.bfloat16)
    for operator in (flash_attention_jvp, flash_attention_jvp_reference):
        output, output_tangent, log_sum_exp = operator(*tensors)
        assert output.shape == output_tangent.shape == tensors[0].shape
        assert log_sum_exp.shape == tensors[0].shape[:3]


X = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"q": X.int()}, "q is int32, but must be float32, bfloat16, float16 or float64"),
        ({"q": X[0]}, "q has shape [4, 3, 8], but must have shape [B, H, T, D] with D > 0"),
        ({"k": X[:1]}, "k has shape [1, 4, 3, 8], but must have shape [2, H_kv, S, 8]"),
        ({"k": X[..., :4]}, "k has shape [2, 4, 3, 4], but must have shape [2, H_kv, S, 8]"),
        ({"k": X[:, :3]}, "k has 3 heads, but must have a divisor of q's 4"),
        ({"k": X[:, :0]}, "k has 0 heads, but must have a divisor of q's 4"),
        ({"k": X[:, :, :2]}, "k has 2 keys, but must have at least as many as q's 3 queries if causal"),
        ({"k": X[:, :, :0]}, "k has shape [2, 4, 0, 8], but must have at least one key"),
        ({"k": X.bfloat16()}, "k is bfloat16, but must have q's dtype float32"),
        ({"v": X[:, :2]}, "v has shape [2, 2, 3, 8], but must have k's shape [2, 4, 3, 8]"),
        ({"v": X.double()}, "v is float64, but must have q's dtype float32"),
        ({"v": X.to("meta")}, "v is on meta, but must be on q's device cpu"),
        (
            {"q_tangent": X[:1]},
            "q_tangent has shape [1, 4, 3, 8], but must have q's shape [2, 4, 3, 8], or a number of probes before it",
        ),
        ({"q_tangent": X.expand(0, 2, 4, 3, 8)}, "q_tangent has 0 probes, but must have at least 1"),
        (
            {"q_tangent": X.expand(2, 2, 4, 3, 8)},
            "k_tangent has shape [2, 4, 3, 8], but must have q_tangent's probes and k's shape [2, 2, 4, 3, 8]",
        ),
        ({"k_tangent": X[:1]}, "k_tangent has shape [1, 4, 3, 8], but must have k's shape [2, 4, 3, 8]"),
        ({"v_tangent": X.half()}, "v_tangent is float16, but must have q's dtype float32"),
        ({"scale": float("inf")}, "scale is inf, but must be finite"),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    names = ("q", "k", "v", "q_tangent", "k_tangent", "v_tangent")
    with pytest.raises(ValueError) as error:
        flash_attention_jvp(**{**dict.fromkeys(names, X), **given})
    assert str(error.value) == told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors = Shape(5, 7, 16, heads=2).draw(dtype)
    torch.library.opcheck(OPERATOR, (*tensors, None, True))
    primals = [torch.randn(5, 2, 2, 16).to(dtype).permute(1, 2, 0, 3) for _ in range(3)]
    probes = [torch.randn(3, 5, 2, 2, 16).to(dtype).permute(0, 2, 3, 1, 4) for _ in range(3)]
    torch.library.opcheck(OPERATOR, (*primals, *probes, 0.5, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    torch.compiler.reset()
    tensors = Shape(5, 7, 16, heads=2).draw(torch.float32)
    compiled = torch.compile(flash_attention_jvp, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x, y in zip(compiled(*tensors), flash_attention_jvp(*tensors), strict=True):
        assert torch.equal(x, y)


def test_backward_says_that_there_is_none():
    tensors = [x.requires_grad_() for x in Shape(3, 3, 8).draw(torch.float32)]
    with pytest.raises(RuntimeError, match="not implemented"):
        flash_attention_jvp(*tensors)[0].sum().backward()
