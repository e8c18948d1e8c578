"""Compiles kernels for the emulator, once per state of their sources."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
CACHE = REPOSITORY / "build" / "cuda_emulator"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-DSPARSECOD_EMULATOR",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-sign-compare",
)


def kernel_sources(csrc: Path = REPOSITORY / "csrc") -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def build(csrc: Path = REPOSITORY / "csrc") -> ctypes.CDLL:
    """Return the library of all kernels under `csrc` (a copy of the project's, for tests that break one)."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _object(source, csrc), [*kernel_sources(csrc), HERE / "emulator.cpp"]))
    library = CACHE / f"{_digest(*objects)}.so"
    if not library.exists():
        _run(["-shared", *map(str, objects)], library)
    return ctypes.CDLL(str(library))


def _object(source: Path, csrc: Path) -> Path:
    headers = [*csrc.glob("cuda/*.h"), *csrc.glob("common/*.h"), *HERE.glob("include/*.h")]
    compiled = CACHE / f"{source.stem}-{_digest(source, *sorted(headers))}.o"
    if not compiled.exists():
        _run([*FLAGS, f"-I{HERE / 'include'}", "-x", "c++", "-c", str(source)], compiled)
    return compiled


def _digest(*files: Path) -> str:
    content = hashlib.sha256(" ".join(FLAGS).encode())
    for file in files:
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


def _run(arguments: list[str], result: Path) -> None:
    """Run the compiler; its result appears whole or not at all, whoever else builds the same."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        unfinished = Path(folder) / result.name
        done = subprocess.run(
            [os.environ.get("CXX", "g++"), *arguments, "-o", str(unfinished)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(unfinished, result)
