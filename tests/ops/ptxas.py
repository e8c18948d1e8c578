"""What ptxas says of the kernels of a .cu file: registers, spills, stack frames. Kept by content under build/."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.cuda_emulator.build import with_headers

REPOSITORY = Path(__file__).parents[2]
CSRC = REPOSITORY / "csrc"
CACHE = REPOSITORY / "build" / "ptxas"
HOPPER = "90a"

_PROPERTIES = re.compile(
    r"Function properties for (\S+)\s+"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_JUSTIFIED = re.compile(
    r"^[ \t]*// spills: (?P<reason>\S[^\n]*)\n"
    r"(?:[ \t]*//[^\n]*\n)*"  # the comment may go on
    r"(?:[ \t]*template\b[^{;]*?>\s*)?"
    r"[^{;]*?__global__[^{;]*?\b(?P<kernel>\w+)\s*\([^()]*\)\s*\{",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Function:
    """A kernel, or a function that was not inlined into one. Bytes per thread."""

    name: str
    stack_frame: int
    spill_stores: int
    spill_loads: int

    @property
    def base_name(self) -> str:
        """The name without namespaces, template arguments, parameters and what it returns."""
        head = re.split(r"[<(]", self.name.replace("(anonymous namespace)", ""))[0]
        return head.split()[-1].split("::")[-1]

    def in_memory(self) -> bool:
        """Whether anything that should be in registers is not."""
        return max(self.stack_frame, self.spill_stores, self.spill_loads) > 0

    def __str__(self) -> str:
        return (
            f"{self.name}: stack frame of {self.stack_frame} bytes, "
            f"{self.spill_stores} bytes of spill stores, {self.spill_loads} of spill loads"
        )


@cache
def find_nvcc() -> Path | None:
    """Return the compiler of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    return Path(found) if found else None


@cache
def nvcc_flags() -> tuple[str, ...]:
    """Return NVCC_FLAGS of setup.py, which cannot be imported without building."""
    for statement in ast.parse((REPOSITORY / "setup.py").read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="NVCC_FLAGS")], value=value):
                return tuple(ast.literal_eval(value))
    raise AssertionError("setup.py has no list NVCC_FLAGS")


@cache
def _nvcc_version(nvcc: Path) -> bytes:
    return subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout


def report(source: Path, architecture: str = HOPPER) -> str:
    """Compile `source` and return what ptxas says, from the last time if nothing has changed since."""
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [*nvcc_flags(), f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"]
    content = hashlib.sha256(_nvcc_version(nvcc) + " ".join(command).encode())
    for file in with_headers(source, CSRC / "cuda"):
        content.update(b"\0" + file.name.encode() + b"\0" + file.read_bytes())
    kept = CACHE / f"{source.stem}-{content.hexdigest()[:16]}.txt"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [nvcc, *command, f"-I{CSRC / 'cuda'}", "-cubin", str(source), "-o", str(unfinished)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        unfinished.write_text(done.stdout + done.stderr)
        os.replace(unfinished, kept)
    return kept.read_text()


def functions(ptxas_report: str) -> list[Function]:
    """Parse what ptxas -v says."""
    found = [(name, *map(int, numbers)) for name, *numbers in _PROPERTIES.findall(ptxas_report)]
    return [Function(_demangle(name), *numbers) for name, *numbers in found]


def _demangle(name: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return name
    plain = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    # The compiler gives the anonymous namespace of each file a name.
    return re.sub(r"\b_(?:GLOBAL__N__|INTERNAL_)\w+", "(anonymous namespace)", plain)


def justified(source: str) -> dict[str, str]:
    """Return the kernels before which a comment `// spills: REASON` stands, and the reason."""
    return {match["kernel"]: match["reason"] for match in _JUSTIFIED.finditer(source)}
