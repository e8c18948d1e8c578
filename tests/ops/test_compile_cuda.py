"""Every CUDA kernel compiles, for Hopper keeps its values in registers, and knows nothing of PyTorch."""

import re
from pathlib import Path

import pytest

from tests.ops import ptxas

KERNELS = sorted((ptxas.CSRC / "cuda").glob("*.cu"))
WITHOUT_KERNELS = {"flash_attention_jvp"}  # chooses among the launchers of other files
SPILLING = Path(__file__).parent / "kernels" / "spilling.cu"

needs_nvcc = pytest.mark.skipif(ptxas.find_nvcc() is None, reason="nvcc is neither under CUDA_HOME nor on PATH")


def unjustified(source: Path, architecture: str = ptxas.HOPPER) -> list[str]:
    """Functions of a file that use local memory without a comment that says why."""
    excused = ptxas.justified(source.read_text())
    functions = ptxas.functions(ptxas.report(source, architecture))
    assert functions or source.stem in WITHOUT_KERNELS, f"ptxas names no kernel in {source.name}"
    return [str(f) for f in functions if f.in_memory() and f.base_name not in excused]


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem)
def test_values_stay_in_registers(source):
    found = unjustified(source)
    assert not found, "\n".join(found)


# Which launch bounds and products of matrices compile elsewhere, a few kernels tell.
OTHER_ARCHITECTURES = ("80", "100")
TELLING = [source for source in KERNELS if source.stem in ("rms_norm_jvp", "flash_attention_jvp_64")]


@needs_nvcc
@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
@pytest.mark.parametrize(
    "source",
    [source if source in TELLING else pytest.param(source, marks=pytest.mark.long) for source in KERNELS],
    ids=lambda source: source.stem,
)
def test_values_stay_in_registers_on_other_architectures(source, architecture):
    found = unjustified(source, architecture)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem)
def test_only_kernels_that_exist_are_excused(source):
    text = source.read_text()
    assert len(ptxas.justified(text)) == len(re.findall(r"^\s*// spills:", text, re.MULTILINE))


@needs_nvcc
def test_the_check_sees_spills_and_excuses_what_is_explained():
    found = unjustified(SPILLING)
    assert len(found) == 1
    assert re.fullmatch(
        r"void sparsecod::cuda::\(anonymous namespace\)::spills<96>\(.*\): "
        r"stack frame of [1-9]\d* bytes, [1-9]\d* bytes of spill stores, [1-9]\d* of spill loads",
        found[0],
    )
    functions = {f.base_name: f for f in ptxas.functions(ptxas.report(SPILLING))}
    assert set(functions) == {"spills", "indexes", "fits"}
    assert functions["indexes"].stack_frame >= 64 and not functions["fits"].in_memory()


def test_a_comment_excuses_the_kernel_that_follows_and_no_other():
    source = """
// spills: first reason
template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 2)
    one(const T* __restrict__ x, T* y) {}

// something else
// spills: second reason,
// which goes on
__global__ void two(float* x) {
}
// spills: of no kernel
constexpr int N = 1;
__global__ void three(float* x) {}
//spills: not the agreed form
__global__ void four(float* x) {}
// spills:
__global__ void five(float* x) {}
"""
    assert ptxas.justified(source) == {"one": "first reason", "two": "second reason,"}


@pytest.mark.parametrize(
    ("name", "base_name"),
    [
        ("void sparsecod::cuda::(anonymous namespace)::rows<float, 4>(float const*, long)", "rows"),
        ("sparsecod::cuda::(anonymous namespace)::rows(float const*, std::pair<int, int>)", "rows"),
        ("void a::rows<a::Pack<float, 4> >(a::Pack<float, 4>)", "rows"),
        ("rows", "rows"),
    ],
)
def test_base_names(name, base_name):
    assert ptxas.Function(name, 0, 0, 0).base_name == base_name


def test_kernels_know_nothing_of_torch():
    files = [file for folder in ("cuda", "common") for file in (ptxas.CSRC / folder).iterdir()]
    assert len(files) > 5
    include = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10)[/"]|^\s*#\s*include\s*[<"]\.\./(bindings|cpu)/')
    lines = [f"{file.name}: {line}" for file in files for line in file.read_text().splitlines() if include.search(line)]
    assert not lines
