"""Proof that the emulator notices a broken kernel: each entry breaks a copy of one, which must then fail.

To add a kernel: write its launch, which runs it on small inputs and checks the results, and list what to break.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsecod_mcore.ops import (
    NUM_COLUMN_SUMS,
    NUM_PROBE_MOMENTS,
    attention_stats_reference,
    flash_attention_jvp_reference,
    probe_moments_reference,
    residual_add_moments_reference,
    rms_norm_jvp_reference,
    swiglu_jvp_reference,
)
from tests.cuda_emulator import operators
from tests.cuda_emulator.build import HERE, REPOSITORY, build
from tests.cuda_emulator.emulator import Emulator, LaunchError, garbage
from tests.ops import attention_cases, test_probe_moments


def row_sums(emulator: Emulator) -> None:
    x, sums = torch.arange(5 * 130).view(5, 130).float(), garbage([5], torch.float32)
    (result,) = emulator.launch("row_sums", [x, sums, 5, 130], [sums])
    assert torch.equal(result, x.sum(-1))


def reverse_in_warps(emulator: Emulator) -> None:
    x, y = torch.randn(96), garbage([96], torch.float32)
    (result,) = emulator.launch("reverse_in_warps", [x, y], [y])
    assert torch.equal(result, x.view(3, 32).flip(1).view(-1))


def swiglu_jvp(emulator: Emulator) -> None:
    for width in (5, 8):  # element by element, and in packs
        gate_up, gate_up_tangent = torch.randn(3, 2 * width), torch.randn(2, 3, 2 * width)
        found = operators.swiglu_jvp(gate_up, gate_up_tangent, by=emulator)
        for result, expected in zip(found, swiglu_jvp_reference(gate_up, gate_up_tangent), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def residual_add_moments(emulator: Emulator) -> None:
    # A row for a warp (and rows for two blocks of records), for a block, and for neither; one row for the checked way.
    for rows, width, with_columns in ((150, 8, False), (9, 520, False), (17, 136, True), (50, 33, True)):
        branch, residual = torch.randn(2, rows, width)
        residual[rows // 2] += 1000
        found, expected = torch.zeros(2, 20, dtype=torch.float64)
        columns = torch.zeros(2, NUM_COLUMN_SUMS, width, dtype=torch.float64) if with_columns else (None, None)
        output = operators.residual_add_moments(branch, residual, found, None, columns[0], by=emulator)
        assert torch.equal(output, residual_add_moments_reference(branch, residual, expected, None, columns[1]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if with_columns:
            torch.testing.assert_close(columns[0], columns[1], rtol=1e-4, atol=1e-2)


def rms_norm_jvp(emulator: Emulator) -> None:
    for rows, width in ((9, 24), (5, 1120), (3, 59)):  # rows for some lanes, for a block, and read twice
        x, x_tangent = torch.randn(2, rows, width)
        weight = torch.randn(width)
        found = operators.rms_norm_jvp(x, x_tangent, weight, 1e-5, by=emulator)
        for result, expected in zip(found, rms_norm_jvp_reference(x, x_tangent, weight, 1e-5), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def probe_moments(emulator: Emulator) -> None:
    v, u = torch.randn(2, 264), torch.randn(2, 37, 264)
    found, expected = (
        (torch.zeros(2, 264, dtype=torch.float64), torch.zeros(2, NUM_PROBE_MOMENTS, dtype=torch.float64))
        for _ in range(2)
    )
    test_probe_moments.emulated(v, u, *found, by=emulator)
    probe_moments_reference(v, u, *expected)
    for result, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-4)


def attention_stats(emulator: Emulator, dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 2, 70, 32).to(dtype), torch.randn(1, 1, 70, 32).to(dtype)
    case = attention_cases.attention(q, k, thresholds=(1e-3, 1e-2))
    entropy, counts = attention_cases.emulated(case, by=emulator)
    expected_entropy, expected_counts = case.apply(attention_stats_reference)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-4, atol=1e-3)
    assert torch.equal(counts, expected_counts)


def attention_stats_in_float32(emulator: Emulator) -> None:
    attention_stats(emulator, torch.float32)


def attention_stats_on_tensor_cores(emulator: Emulator) -> None:
    attention_stats(emulator, torch.bfloat16)


def flash_attention_jvp(emulator: Emulator, dtype: torch.dtype) -> None:
    # Two blocks of queries, rows that are no multiple of anything, and a last tile of one key: one tile that takes
    # another's place in shared memory, and one that has its place to itself.
    for queries, keys in ((70, 129), (65, 65)):
        tensors = [torch.randn(1, 1, rows, 32).to(dtype) for rows in (queries, keys, keys) * 2]
        found = operators.flash_attention_jvp(*tensors, by=emulator)
        tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for result, expected in zip(found, flash_attention_jvp_reference(*tensors), strict=True):
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def flash_attention_jvp_in_float32(emulator: Emulator) -> None:
    flash_attention_jvp(emulator, torch.float32)


def flash_attention_jvp_on_tensor_cores(emulator: Emulator) -> None:
    flash_attention_jvp(emulator, torch.bfloat16)


@dataclass(frozen=True)
class Mutation:
    """In `file`, `text`, which occurs once, becomes `replacement`; `launch` of `kernel` (default: file) has to fail."""

    file: Path
    launch: Callable[[Emulator], None]
    text: str
    replacement: str = ""
    kernel: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.file.stem}: {self.text.strip()} -> {self.replacement.strip() or 'nothing'}"

    @property
    def sources(self) -> tuple[Path, ...]:
        return self.kernel or (self.file,)


SUMS = HERE / "kernels" / "sums.cu"
CUDA = REPOSITORY / "csrc" / "cuda"
SWIGLU = CUDA / "swiglu_jvp.cu"
ADD = CUDA / "residual_add_moments.cu"
ADD_ROWS, ADD_RECORDS, ADD_COLUMNS = (CUDA / f"residual_add_{part}.h" for part in ("rows", "records", "columns"))
NORM = CUDA / "rms_norm_jvp.cu"
PROBES = CUDA / "probe_moments.cu"
STATS = CUDA / "attention_stats.cu"
FLASH_MMA, FLASH_FLOAT32 = CUDA / "flash_attention_jvp_mma.h", CUDA / "flash_attention_jvp_float32.cu"
FLASH = (
    *(CUDA / f"flash_attention_jvp{part}.cu" for part in ("", "_32", "_float32")),
    HERE / "kernels" / "other_head_sizes.cu",
)
BARRIER = "  __syncthreads();\n"


def in_flash_attention_jvp(file: Path, text: str, replacement: str = "") -> Mutation:
    launch = flash_attention_jvp_in_float32 if file == FLASH_FLOAT32 else flash_attention_jvp_on_tensor_cores
    return Mutation(file, launch, text, replacement, kernel=FLASH)


MUTATIONS = [
    Mutation(SUMS, row_sums, "__syncthreads();  // of_warps is written"),
    Mutation(SUMS, row_sums, "__syncthreads();  // of_warps has been read"),
    Mutation(SUMS, row_sums, "row < rows", "row <= rows"),
    Mutation(SUMS, row_sums, "row < rows", "row < rows - 1"),
    Mutation(SUMS, row_sums, "column < width", "column <= width"),
    Mutation(SUMS, row_sums, "column < width", "column < width - 1"),
    Mutation(SUMS, reverse_in_warps, "__syncwarp();"),
    Mutation(SWIGLU, swiglu_jvp, "i < packs;", "i <= packs;"),
    Mutation(SWIGLU, swiglu_jvp, "i < packs;", "i < packs - 1;"),
    Mutation(SWIGLU, swiglu_jvp, "at + row * width, up_at", "at + (row + 1) * width, up_at"),
    Mutation(SWIGLU, swiglu_jvp, "packed = in_packs", "packed = true || in_packs"),
    Mutation(CUDA / "group.h", residual_add_moments, "    __syncthreads();\n", kernel=(ADD,)),
    Mutation(
        ADD, residual_add_moments, f"{BARRIER}  if (threadIdx.x < NUM_OPERANDS)", "  if (threadIdx.x < NUM_OPERANDS)"
    ),
    Mutation(
        ADD_RECORDS,
        residual_add_moments,
        f"{BARRIER}  if (threadIdx.x < NUM_MOMENTS)",
        "  if (threadIdx.x < NUM_MOMENTS)",
        kernel=(ADD,),
    ),
    Mutation(ADD_RECORDS, residual_add_moments, f"gridDim.x - 1;\n{BARRIER}", "gridDim.x - 1;\n", kernel=(ADD,)),
    Mutation(
        ADD_COLUMNS,
        residual_add_moments,
        f"  {BARRIER}    if (threadIdx.y > 0)",
        "    if (threadIdx.y > 0)",
        kernel=(ADD,),
    ),
    Mutation(ADD, residual_add_moments, "Group::index(); row < rows.count;", "Group::index(); row <= rows.count;"),
    Mutation(ADD, residual_add_moments, "Group::index(); row < rows.count;", "Group::index(); row < rows.count - 1;"),
    Mutation(
        ADD_RECORDS, residual_add_moments, "present = row < rows.count", "present = row <= rows.count", kernel=(ADD,)
    ),
    Mutation(
        ADD_ROWS,
        residual_add_moments,
        "column = first; column < rows.width;",
        "column = first; column <= rows.width;",
        kernel=(ADD,),
    ),
    Mutation(NORM, rms_norm_jvp, f"= sums;\n{BARRIER}", "= sums;\n"),
    Mutation(PROBES, probe_moments, f"{BARRIER}  for (int warp = 1; warp < ROWS", "  for (int warp = 1; warp < ROWS"),
    Mutation(PROBES, probe_moments, f"{BARRIER}  // From here on", "  // From here on"),
    Mutation(
        STATS, attention_stats_in_float32, f"      {BARRIER}        load_rows<QUERIES>", "        load_rows<QUERIES>"
    ),
    Mutation(STATS, attention_stats_in_float32, f"      {BARRIER}#pragma unroll 4", "#pragma unroll 4"),
    Mutation(
        CUDA / "attention_stats_mma.h",
        attention_stats_on_tensor_cores,
        f"    wait_for_copies<0>();\n  {BARRIER}    // Lane 8 i",
        f"  {BARRIER}    // Lane 8 i",
        kernel=(STATS,),
    ),
    Mutation(
        CUDA / "attention_stats_mma.h",
        attention_stats_on_tensor_cores,
        "    __syncthreads();  // keys overwrite the queries\n",
        kernel=(STATS,),
    ),
    in_flash_attention_jvp(FLASH_MMA, "    wait_for_copies<0>();\n"),
    in_flash_attention_jvp(
        FLASH_MMA, "    __syncthreads();  // this tile has arrived, and nobody reads the tile before it any more\n"
    ),
    in_flash_attention_jvp(FLASH_MMA, "+ KEYS <= last_key_of_block", "+ KEYS < last_key_of_block"),
    in_flash_attention_jvp(FLASH_MMA, "<= last_key[i / 2]", "< last_key[i / 2]"),
    in_flash_attention_jvp(FLASH_MMA, "row >= problem.queries || chunk", "row > problem.queries || chunk"),
    in_flash_attention_jvp(FLASH_MMA, "  __syncwarp();\n  for (int i = lane", "  for (int i = lane"),
    in_flash_attention_jvp(FLASH_FLOAT32, "    __syncthreads();  // nobody reads the tile before this one any more\n"),
    in_flash_attention_jvp(FLASH_FLOAT32, "    wait_for_copies<0>();\n"),
    in_flash_attention_jvp(FLASH_FLOAT32, "i * SIDE <= last_key;", "i * SIDE < last_key;"),
    in_flash_attention_jvp(FLASH_FLOAT32, "    __syncwarp();\n"),
    in_flash_attention_jvp(FLASH_FLOAT32, "query >= problem.queries", "query > problem.queries"),
]


def emulator_of(sources: tuple[Path, ...], folder: Path, broken: Mutation | None = None) -> Emulator:
    """Return an emulator of a few kernels, compiled from a copy of all sources in which a mutation has been made."""
    csrc = folder / "csrc"
    shutil.copytree(REPOSITORY / "csrc", csrc)
    copies = [Path(shutil.copy(source, csrc / "cuda")) for source in sources]
    if broken is not None:
        copy = csrc / "cuda" / broken.file.name
        text = copy.read_text()
        assert text.count(broken.text) == 1, f"{broken.file.name} no longer has this once: {broken.text}"
        copy.write_text(text.replace(broken.text, broken.replacement))
    return Emulator(build(csrc, copies))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_broken_kernel_fails(mutation: Mutation, tmp_path: Path):
    torch.manual_seed(0)
    emulator = emulator_of(mutation.sources, tmp_path, mutation)
    with pytest.raises((LaunchError, AssertionError)):
        mutation.launch(emulator)


@pytest.mark.parametrize(
    "sources", sorted({mutation.sources for mutation in MUTATIONS}), ids=lambda sources: sources[0].stem
)
def test_the_same_kernel_unbroken_passes(sources: tuple[Path, ...], tmp_path: Path):
    torch.manual_seed(0)
    emulator = emulator_of(sources, tmp_path)
    for launch in dict.fromkeys(mutation.launch for mutation in MUTATIONS if mutation.sources == sources):
        launch(emulator)
