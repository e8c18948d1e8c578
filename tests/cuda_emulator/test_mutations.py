"""Proof that the emulator notices a broken kernel: each entry breaks a copy of one, which must then fail.

To add a kernel: write its launch, which runs it on a small input and checks the result, and list what to break.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsecod_mcore.ops import swiglu_jvp_reference
from tests.cuda_emulator.build import HERE, REPOSITORY, build
from tests.cuda_emulator.emulator import Emulator, LaunchError, garbage


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
        gate_up, gate_up_tangent = torch.randn(2, 3, 2 * width)
        outputs = [garbage([3, width], torch.float32) for _ in range(2)]
        arguments = [gate_up, gate_up_tangent, *outputs, torch.float32, 3, width]
        results = emulator.launch("sparsecod_swiglu_jvp", arguments, outputs)
        for result, expected in zip(results, swiglu_jvp_reference(gate_up, gate_up_tangent), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@dataclass
class Mutation:
    """In `file`, `text`, which occurs once, becomes `replacement`; `launch` then has to fail."""

    file: Path
    launch: Callable[[Emulator], None]
    text: str
    replacement: str

    def __str__(self) -> str:
        return f"{self.file.stem}: {self.text} -> {self.replacement or 'nothing'}"


SUMS = HERE / "kernels" / "sums.cu"
CUDA = REPOSITORY / "csrc" / "cuda"

MUTATIONS = [
    Mutation(SUMS, row_sums, "__syncthreads();  // of_warps is written", ""),
    Mutation(SUMS, row_sums, "__syncthreads();  // of_warps has been read", ""),
    Mutation(SUMS, row_sums, "row < rows", "row <= rows"),
    Mutation(SUMS, row_sums, "row < rows", "row < rows - 1"),
    Mutation(SUMS, row_sums, "column < width", "column <= width"),
    Mutation(SUMS, row_sums, "column < width", "column < width - 1"),
    Mutation(SUMS, reverse_in_warps, "__syncwarp();", ""),
    Mutation(CUDA / "swiglu_jvp.cu", swiglu_jvp, "i < packs;", "i <= packs;"),
    Mutation(CUDA / "swiglu_jvp.cu", swiglu_jvp, "i < packs;", "i < packs - 1;"),
    Mutation(CUDA / "swiglu_jvp.cu", swiglu_jvp, "at + row * width, up_at", "at + (row + 1) * width, up_at"),
    Mutation(CUDA / "swiglu_jvp.cu", swiglu_jvp, "packed = in_packs", "packed = true || in_packs"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_broken_kernel_fails(mutation: Mutation, tmp_path: Path):
    torch.manual_seed(0)
    source = mutation.file.read_text()
    assert source.count(mutation.text) == 1, f"{mutation.file.name} no longer has this once: {mutation.text}"
    broken = tmp_path / mutation.file.name
    broken.write_text(source.replace(mutation.text, mutation.replacement))
    emulator = Emulator(build(sources=[broken]))
    with pytest.raises((LaunchError, AssertionError)):
        mutation.launch(emulator)


@pytest.mark.parametrize("file", sorted({mutation.file for mutation in MUTATIONS}), ids=lambda file: file.stem)
def test_the_same_kernel_unbroken_passes(file: Path, tmp_path: Path):
    torch.manual_seed(0)
    copy = tmp_path / file.name
    copy.write_text(file.read_text())
    emulator = Emulator(build(sources=[copy]))
    for launch in dict.fromkeys(mutation.launch for mutation in MUTATIONS if mutation.file == file):
        launch(emulator)
