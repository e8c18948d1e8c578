"""Counts below thresholds: exact, so that every test demands equality. The CUDA kernel runs in the emulator."""

import ctypes
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsecod_mcore.ops import count_below, count_below_reference
from tests.cuda_emulator.emulator import DTYPES as CUDA_DTYPES
from tests.cuda_emulator.emulator import Emulator, Guarded
from tests.ops import tangents

THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)  # the paper's
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40, 6e-8, 65504.0, 3e38)


def spread_out(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of all magnitudes around the thresholds, with special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10 ** (3 * torch.randn(size, generator=generator) - 3)
    place = torch.randint(max(size, 1), (len(SPECIAL),), generator=generator)
    if size > len(SPECIAL):
        x[place] = torch.tensor(SPECIAL)
    return x.to(dtype)


def with_slack(x: Tensor, offset: int) -> tuple[Guarded, int]:
    """Copy x to where zeros, which would count, surround it; return the memory and x's address, unaligned by offset."""
    surrounded = torch.cat([torch.zeros(offset), x.float(), torch.zeros(16)]).to(x.dtype)
    memory = Guarded(surrounded.nbytes)
    memory.write(surrounded)
    return memory, memory.address + offset * x.element_size()


def emulated(tensors: list[Tensor], thresholds: tuple[float, ...], offsets: tuple[int, ...] = (0,)) -> Tensor:
    placed = [with_slack(x.flatten(), offsets[i % len(offsets)]) for i, x in enumerate(tensors)]
    counts = torch.zeros(len(tensors), len(thresholds), dtype=torch.int64)
    arguments = (
        (ctypes.c_void_p * len(tensors))(*(address for _, address in placed)),
        (ctypes.c_int64 * len(tensors))(*(x.numel() for x in tensors)),
        (ctypes.c_int * len(tensors))(*(CUDA_DTYPES[x.dtype] for x in tensors)),
        len(tensors),
        (ctypes.c_double * len(thresholds))(*thresholds),
        len(thresholds),
        counts,
    )
    return Emulator().launch("sparsecod_count_below", arguments, [counts])[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5,), (97, 59), (123, 96), (3, 1120), (5, 8192), (70001,), (2, 3, 4, 5)])
def test_counts_are_exact(dtype, shape):
    x = spread_out(torch.Size(shape).numel(), dtype).view(shape)
    expected = [[sum(v < t for v in x.double().abs().flatten().tolist()) for t in THRESHOLDS]]
    assert count_below([x], THRESHOLDS).tolist() == expected
    assert count_below_reference([x], THRESHOLDS).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_are_not_rounded(dtype):
    smallest = torch.finfo(dtype).smallest_normal
    for threshold in (*THRESHOLDS, 0.5, 1.0, 3.0, smallest, smallest * 0.3, 65504.0, 65519.0, 3.5e38, 1e300, torch.inf):
        x = torch.tensor([min(threshold, torch.finfo(dtype).max)], dtype=torch.float64).to(dtype)
        around = torch.cat([x, x.nextafter(x.new_full((), torch.inf)), x.nextafter(x.new_zeros(()))])
        for value in (around, -around):
            exact = [a if a in (torch.inf, -torch.inf) else Fraction(a) for a in value.double().tolist()]
            bound = threshold if threshold == torch.inf else Fraction(threshold)
            assert count_below([value], [threshold]).item() == sum(abs(a) < bound for a in exact), (threshold, value)


def test_every_bfloat16_and_float16_number():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    thresholds = (1e-40, 6e-8, 1e-5, 0.3, 1.0, 65519.0, 1e6, torch.inf)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)
        expected = [[(x.double().abs() < t).sum().item() for t in thresholds]]
        assert count_below([x], thresholds).tolist() == expected
    both = [bits.view(torch.bfloat16)[::8].contiguous(), bits.view(torch.float16)[3::8].contiguous()]
    assert torch.equal(emulated(both, thresholds), count_below_reference(both, thresholds))


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_thresholds_in_any_order(count):
    thresholds = (1e-2, 1e-5, 1e9, 1e-3, 1e-3, 3.0, 1e-30, 0.1)[:count]
    x = [spread_out(1000, torch.float32), spread_out(77, torch.bfloat16)]
    expected = count_below_reference(x, thresholds)
    assert torch.equal(count_below(x, thresholds), expected)
    assert torch.equal(emulated(x, thresholds), expected)


def test_tensors_of_mixed_dtypes_some_empty():
    x = [spread_out(size, dtype, size) for size in (0, 1, 7, 0, 300) for dtype in DTYPES]
    assert torch.equal(count_below(x, THRESHOLDS), count_below_reference(x, THRESHOLDS))
    assert count_below([torch.empty(0, 3)], THRESHOLDS).tolist() == [[0, 0, 0, 0]]
    assert torch.equal(count_below([torch.tensor(2e-4)], THRESHOLDS), torch.tensor([[0, 0, 1, 1]]))


@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("offset", range(8))
def test_cuda_kernel_on_any_alignment_and_length(dtype, offset):
    sizes = (1, 2, 5, 7, 8, 9, 15, 16, 17, 97, 1023)
    x = [spread_out(size, dtype, size) for size in sizes]
    assert torch.equal(emulated(x, THRESHOLDS, (offset,)), count_below_reference(x, THRESHOLDS))


def test_cuda_kernel_on_tensors_of_several_chunks():
    x = [
        spread_out(40_001, torch.float32),
        spread_out(0, torch.float16),
        spread_out(65_536, torch.bfloat16),
        spread_out(32_768 + 3, torch.float16),
    ]
    assert torch.equal(emulated(x, THRESHOLDS, (3, 0, 1, 6)), count_below_reference(x, THRESHOLDS))


def test_cuda_kernel_on_more_tensors_than_one_launch_takes():
    x = [spread_out(i % 5, list(CUDA_DTYPES)[i % 3], i) for i in range(250)]
    assert torch.equal(emulated(x, THRESHOLDS[:1]), count_below_reference(x, THRESHOLDS[:1]))


def laid_out(shape: list[int], layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    size = torch.Size(shape).numel()
    if layout == "transposed":
        return spread_out(size, dtype, seed).view(shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "slice":
        return spread_out(3 * size, dtype, seed).view(*shape[:-1], 3 * shape[-1])[..., 1::3]
    if layout == "expanded":
        return spread_out(shape[-1], dtype, seed).expand(shape)
    return spread_out(size + 1, dtype, seed)[1:].view(shape)


@settings(max_examples=150, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 12), min_size=1, max_size=4),
            st.sampled_from(["contiguous", "transposed", "slice", "expanded"]),
            st.sampled_from(DTYPES),
        ),
        min_size=1,
        max_size=5,
    ),
    thresholds=st.lists(st.floats(0, exclude_min=True), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
)
def test_any_shape_layout_dtype_and_threshold(tensors, thresholds, seed):
    x = [laid_out(*tensor, seed=seed + i) for i, tensor in enumerate(tensors)]
    assert torch.equal(count_below(x, thresholds), count_below_reference(x, thresholds))


def test_the_same_on_any_number_of_threads():
    x = [spread_out(size, dtype, size) for size in (300_001, 5, 150_000) for dtype in DTYPES]
    expected = count_below_reference(x, THRESHOLDS)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(count_below(x, THRESHOLDS), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_counts_the_same(capability):
    program = """
import torch
from sparsecod_mcore.ops import count_below, count_below_reference
torch.manual_seed(0)
x = [torch.randn(9001).to(d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
thresholds = (1e-3, 0.5, 0.1, 1.0, 2.0)
assert torch.equal(count_below(x, thresholds), count_below_reference(x, thresholds))
"""
    tangents.run_with_capability(capability, program)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x = [torch.randn(3, 5, requires_grad=requires_grad), torch.randn(7, 2).bfloat16().t()]
    torch.library.opcheck(torch.ops.sparsecod.count_below.default, (x, THRESHOLDS))


def test_compiled():
    torch.compiler.reset()
    x = [torch.randn(30, 5), torch.randn(70).bfloat16()]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def sparsity(x):
        return count_below([y * 0.5 for y in x], THRESHOLDS) + 1

    assert torch.equal(sparsity(x), count_below_reference([y * 0.5 for y in x], THRESHOLDS) + 1)


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("tensors", "thresholds", "told"),
    [
        ([], [0.1], "tensors is empty, but must hold at least one tensor"),
        ([X, X.int()], [0.1], "tensors[1] is int32, but must be float32, bfloat16, float16 or float64"),
        ([X, X.to("meta")], [0.1], "tensors[1] is on meta, but must be on tensors[0]'s device cpu"),
        ([X], [], "thresholds has 0 numbers, but must have 1 to 8"),
        ([X], [0.1] * 9, "thresholds has 9 numbers, but must have 1 to 8"),
        ([X], [0.1, 0.0], "thresholds[1] is 0, but must be above 0"),
        ([X], [-1e-3], "thresholds[0] is -0.001, but must be above 0"),
        ([X], [torch.nan], "thresholds[0] is nan, but must be above 0"),
    ],
)
def test_arguments_that_do_not_fit(tensors, thresholds, told):
    with pytest.raises(ValueError) as error:
        count_below(tensors, thresholds)
    assert str(error.value) == told
