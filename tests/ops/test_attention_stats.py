"""Attention's entropy and sparsity against float64: the CPU kernel, and the CUDA kernel in the emulator."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecod_mcore.ops import attention_stats, attention_stats_reference
from tests.cuda_emulator.emulator import DTYPES as CUDA_DTYPES
from tests.ops.attention_cases import THRESHOLDS, Case, Expected, attention, emulated, oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def normal(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q * 1.5, k


def large_mean(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q + 10, k + 10


def outlier_dimension(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q[..., 0], k[..., 0] = 100, 50
    return q, k


def outlier_keys(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    k[:, :, ::7, 3] *= 100
    return q, k


def uniform(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k * 1e-3


DISTRIBUTIONS = (normal, large_mean, outlier_dimension, outlier_keys, uniform)


def draw(shape: tuple[int, ...], distribution, dtype: torch.dtype, causal: bool = True) -> Case:
    """A case of shape B, H, H_kv, T, S, D."""
    batch, heads, kv_heads, queries, keys, dim = shape
    q, k = distribution(torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, keys, dim))
    return attention(q.to(dtype), k.to(dtype), causal)


def check_counts(counts: Tensor, expected: Expected) -> None:
    assert (counts >= expected.fewest).all() and (counts <= expected.most).all(), (counts, expected)


def check_accuracy(measure, cases: list[Case]) -> None:
    """Demand at most twice the error of the composite, which takes all products in float32 for bfloat16 as well.

    Beyond that, what rounding the terms of scores and the log-sum-exp once can do.
    """
    errors = []
    for case in cases:
        expected = oracle(case)
        entropy, counts = measure(case)
        composite, _ = case.apply(attention_stats_reference)
        check_counts(counts, expected)
        errors.append([((x - expected.entropy).abs() / expected.condition).max() for x in (entropy, composite)])
    error, composite_error = torch.tensor(errors).amax(0)
    assert error <= 2 * composite_error + torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 2, 2, 1, 1, 59), (1, 4, 2, 5, 97, 96), (1, 2, 1, 123, 123, 64)])
def test_error_on_cpu(distribution, dtype, shape):
    torch.manual_seed(0)
    cases = [draw(shape, distribution, dtype) for _ in range(3)]
    check_accuracy(lambda case: case.apply(attention_stats), cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1025, 1025, 96), (1, 1, 1, 1, 1120, 256), (1, 2, 2, 97, 2048, 1)])
def test_error_on_cpu_over_many_keys(dtype, shape):
    torch.manual_seed(0)
    check_accuracy(lambda case: case.apply(attention_stats), [draw(shape, normal, dtype)])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_the_cuda_kernel(distribution, dtype):
    torch.manual_seed(0)
    for shape in ((2, 2, 2, 1, 1, 64), (1, 2, 1, 5, 97, 96), (1, 2, 1, 40, 59, 32)):
        check_accuracy(emulated, [draw(shape, distribution, dtype) for _ in range(2)])


# Around the sizes of a warp's rows, of tiles and of blocks, and over all compiled head dimensions.
CUDA_SHAPES = [
    (1, 1, 1, 32, 32, 32),
    (2, 2, 1, 33, 64, 40),
    (1, 2, 2, 64, 65, 72),
    (1, 2, 1, 65, 130, 80),
    (1, 1, 1, 127, 192, 104),
    (1, 1, 1, 128, 128, 128),
    (1, 1, 1, 129, 129, 136),
    (1, 2, 1, 130, 131, 192),
    (1, 1, 1, 3, 70, 200),
    (1, 1, 1, 40, 66, 256),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_kernel_over_tiles_and_head_dimensions(dtype, shape):
    torch.manual_seed(0)
    check_accuracy(emulated, [draw(shape, normal, dtype)])


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 5, 3, 32), (1, 1, 1, 129, 70, 64)])
def test_all_keys_are_seen_if_not_causal(dtype, shape):
    torch.manual_seed(0)
    case = draw(shape, normal, dtype, causal=False)
    check_accuracy(emulated, [case])
    check_accuracy(lambda case: case.apply(attention_stats), [case])


@pytest.mark.parametrize("dim", [1, 7, 33])
def test_cuda_kernel_takes_any_head_dimension_in_float32(dim):
    torch.manual_seed(0)
    check_accuracy(emulated, [draw((1, 2, 1, 9, 70, dim), normal, torch.float32)])


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_cuda_kernel_on_megatrons_layout(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(35, 2, 4, 48).to(dtype), torch.randn(70, 2, 2, 48).to(dtype)
    case = attention(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3))
    check_accuracy(emulated, [case])


@pytest.mark.parametrize("count", [0, 1, 3, 5, 8])
def test_any_number_of_thresholds_in_any_order(count):
    torch.manual_seed(0)
    thresholds = (1e-2, 1e-5, 2.0, 1e-3, 1e-3, 0.3, 1e-300, math.inf)[:count]
    case = draw((1, 2, 1, 20, 40, 32), normal, torch.bfloat16)
    case.thresholds = thresholds
    _, expected = case.apply(attention_stats_reference)
    for _, counts in (case.apply(attention_stats), emulated(case)):
        assert torch.equal(counts, expected)
    assert expected.shape == (1, 2, count)


def test_known_values():
    """Equal scores: query i spreads evenly over i + 1 keys, and has entropy ln(i + 1)."""
    case = attention(torch.zeros(1, 1, 50, 32), torch.randn(1, 1, 50, 32))
    case.thresholds = (1 / 20.5, 1 / 40.5)
    for entropy, counts in (case.apply(attention_stats), emulated(case)):
        torch.testing.assert_close(entropy.item(), math.lgamma(51), rtol=1e-6, atol=0)
        assert counts.tolist() == [[[sum(range(21, 51)), sum(range(41, 51))]]]


def test_float64_is_measured_in_float64():
    torch.manual_seed(0)
    case = draw((1, 4, 2, 140, 150, 40), normal, torch.float64)
    expected = oracle(case)
    entropy, counts = case.apply(attention_stats)
    torch.testing.assert_close(entropy, expected.entropy, rtol=1e-13, atol=0)
    assert torch.equal(counts, expected.fewest) and torch.equal(counts, expected.most)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("argument", ["q", "k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_that_is_not_finite_spoils_its_head_only(bad, argument, dtype):
    torch.manual_seed(0)
    case = draw((1, 2, 2, 40, 40, 32), normal, dtype)
    good, _ = case.apply(attention_stats)
    getattr(case, argument)[0, 1, 20, 3] = bad
    case = attention(case.q, case.k)
    for entropy, _ in (case.apply(attention_stats), emulated(case), case.apply(attention_stats_reference)):
        assert entropy[0, 1].isnan()
        torch.testing.assert_close(entropy[0, 0], good[0, 0], rtol=1e-6, atol=0)


def test_weights_that_vanish_leave_the_entropy_as_it_is():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 35, 32), torch.randn(1, 1, 35, 32)
    q[..., 0], k[..., 0] = 1e18, 0
    hidden = k.clone()
    hidden[..., 0] = -1e18
    expected, _ = attention(q, k, causal=False).apply(attention_stats_reference)
    case = attention(q, torch.cat([hidden, k], 2), causal=False)
    for entropy, counts in (case.apply(attention_stats), emulated(case)):
        torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)
        assert counts[0, 0, 0] == 35 * 35


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5, 8), (2, 0, 1, 5, 5, 8), (1, 2, 1, 0, 5, 8), (1, 2, 1, 0, 0, 8)])
def test_empty_inputs_have_no_entropy(shape):
    batch, heads, kv_heads, queries, keys, dim = shape
    q, k = torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, keys, dim)
    entropy, counts = attention_stats(q, k, torch.zeros(batch, heads, queries), 1.0, THRESHOLDS)
    assert entropy.shape == (batch, heads) and counts.shape == (batch, heads, 4)
    assert not entropy.any() and not counts.any()


def laid_out(shape: list[int], layout: str, dtype: torch.dtype) -> Tensor:
    match layout:
        case "rows first":
            return torch.randn(shape[2], shape[0], shape[1], shape[3]).to(dtype).permute(1, 2, 0, 3)
        case "slice":
            return torch.randn(*shape[:3], 3 * shape[3] + 2).to(dtype)[..., 1 : 1 + shape[3]]
        case "transposed":
            return torch.randn(*shape[:2], shape[3], shape[2]).to(dtype).transpose(2, 3)
        case "expanded":
            return torch.randn(1, 1, *shape[2:]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


layouts = st.sampled_from(["contiguous", "rows first", "slice", "transposed", "expanded"])


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(1, 150),
    more_keys=st.integers(0, 110),
    dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    q_layout=layouts,
    k_layout=layouts,
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_and_dtype(
    batch, kv_heads, group, queries, more_keys, dim, dtype, q_layout, k_layout, causal, seed
):
    torch.manual_seed(seed)
    q = laid_out([batch, kv_heads * group, queries, dim], q_layout, dtype)
    k = laid_out([batch, kv_heads, queries + more_keys, dim], k_layout, dtype)
    case = attention(q, k, causal)
    expected = oracle(case)
    entropy, counts = case.apply(attention_stats)
    assert ((entropy - expected.entropy).abs() <= 1e-6 * (expected.condition + queries)).all()
    check_counts(counts, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_from_run_to_run_and_on_any_number_of_threads(dtype):
    torch.manual_seed(0)
    case = draw((1, 3, 1, 700, 700, 24), normal, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(case.apply(attention_stats))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_measures_the_same(capability):
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", capability.upper()):
        pytest.skip("the other tests run it")
    told = run(
        """
import torch
from sparsecod_mcore.ops import attention_stats, attention_stats_reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    q, k = torch.randn(1, 2, 140, 20).to(dtype), torch.randn(1, 1, 150, 20).to(dtype)
    arguments = (q, k, torch.full((1, 2, 140), 4.0, dtype=torch.promote_types(dtype, torch.float32)), 0.3, [1e-3, 0.02])
    entropy, counts = attention_stats(*arguments)
    expected, expected_counts = attention_stats_reference(*arguments)
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)
    assert (counts - expected_counts).abs().max() <= 2
print(torch.backends.cpu.get_cpu_capability())
""",
        ATEN_CPU_CAPABILITY=capability,
    )
    assert told == capability.upper()


def test_memory_is_a_twentieth_of_one_matrix_of_weights():
    """The composite holds several; here, all the address space left is a twentieth of one."""
    run("""
import resource, torch
from sparsecod_mcore.ops import attention_stats
torch.set_num_threads(1)
H, T = 8, 2048
q, k, lse = torch.randn(1, H, T, 8), torch.randn(1, H, T, 8), torch.full((1, H, T), 8.0)
attention_stats(q[:, :, :9], k[:, :, :9], lse[:, :, :9], 1.0, [1e-3])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + H * T * T * 4 // 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
attention_stats(q, k, lse, 1.0, [1e-3])
try:
    torch.empty(H * T * T // 10)
except RuntimeError:
    pass
else:
    raise SystemExit("the limit does not hold")
""")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k = torch.randn(2, 4, 6, 8).to(dtype), torch.randn(7, 2, 2, 8).to(dtype).permute(1, 2, 0, 3)
    operator = torch.ops.sparsecod.attention_stats.default
    torch.library.opcheck(operator, (q, k, torch.randn(2, 4, 6), 0.3, THRESHOLDS, True))


def test_no_gradient_is_made_up():
    case = attention(torch.randn(1, 1, 3, 8, requires_grad=True), torch.randn(1, 1, 3, 8))
    entropy, _ = case.apply(attention_stats)
    with pytest.raises(RuntimeError, match=r"derivative for sparsecod::attention_stats is not implemented"):
        entropy.sum().backward()


def test_compiled():
    torch.compiler.reset()
    case = draw((1, 2, 1, 6, 9, 8), normal, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def measure(q, k, lse):
        entropy, counts = attention_stats(q, k, lse, case.scale, THRESHOLDS)
        return entropy * 2, counts + 1

    entropy, counts = case.apply(attention_stats)
    compiled_entropy, compiled_counts = measure(case.q, case.k, case.lse)
    assert torch.equal(compiled_entropy, entropy * 2) and torch.equal(compiled_counts, counts + 1)


GIVEN = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 2, 5, 8), "lse": torch.zeros(2, 4, 3)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"q": GIVEN["q"].int()}, "q is int32, but must be float32, bfloat16, float16 or float64"),
        ({"q": GIVEN["q"][0]}, "q has shape [4, 3, 8], but must have shape [B, H, T, D]"),
        ({"q": GIVEN["q"][..., :0]}, "q has shape [2, 4, 3, 0], but must have shape [B, H, T, D]"),
        (
            {"k": GIVEN["k"][..., :7]},
            "k has shape [2, 2, 5, 7], but must have shape [B, H_kv, S, D] with B and D as in q's shape [2, 4, 3, 8]",
        ),
        ({"k": GIVEN["k"].bfloat16()}, "k is bfloat16, but must have q's dtype float32"),
        ({"k": GIVEN["k"].to("meta")}, "k is on meta, but must be on q's device cpu"),
        ({"k": torch.zeros(2, 3, 5, 8)}, "k has 3 heads, but must have a divisor of q's 4"),
        ({"k": GIVEN["k"][:, :, :2]}, "k has 2 positions, but must have at least q's 3, the last of which sees all"),
        ({"lse": GIVEN["lse"][:, :2]}, "lse has shape [2, 2, 3], but must have q's first dimensions [2, 4, 3]"),
        ({"lse": GIVEN["lse"].double()}, "lse is float64, but must be float32"),
        ({"lse": GIVEN["lse"].to("meta")}, "lse is on meta, but must be on q's device cpu"),
        ({"thresholds": [0.1] * 9}, "thresholds has 9 numbers, but must have 0 to 8"),
        ({"thresholds": [0.1, -1.0]}, "thresholds[1] is -1, but must be above 0"),
    ],
)
def test_arguments_that_do_not_fit(given, told):
    arguments = {**GIVEN, "thresholds": [0.1], **given}
    with pytest.raises(ValueError) as error:
        attention_stats(arguments["q"], arguments["k"], arguments["lse"], 1.0, arguments["thresholds"])
    assert str(error.value) == told
