"""Compiles kernels for the emulator, once per state of their sources."""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
CACHE = REPOSITORY / "build" / "cuda_emulator"
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-DSPARSECOD_EMULATOR",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",  # its longjmp does not know fibers
    "-fsanitize=alignment,bounds",  # reported by emulator.cpp
    "-Wall",
    "-Wno-sign-compare",
    "-Wno-unknown-pragmas",
)


def kernel_sources(csrc: Path = REPOSITORY / "csrc") -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def build(csrc: Path = REPOSITORY / "csrc", sources: Sequence[Path] | None = None) -> ctypes.CDLL:
    """Return the library of all kernels under `csrc`, or of `sources` anywhere, with the headers of `csrc`."""
    sources = kernel_sources(csrc) if sources is None else sources
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _object(source, csrc), [*sources, HERE / "emulator.cpp"]))
    library = CACHE / f"{_digest(*objects)}.so"
    if not library.exists():
        _run(["-shared", *map(str, objects)], library)
    return ctypes.CDLL(str(library))


def _object(source: Path, csrc: Path) -> Path:
    folders = (HERE / "include", csrc / "cuda")
    compiled = CACHE / f"{source.stem}-{_digest(*with_headers(source, *folders))}.o"
    if not compiled.exists():
        include = [f"-I{folder}" for folder in folders]
        _run([*FLAGS, *include, "-x", "c++", "-c", str(source)], compiled)
    return compiled


def with_headers(source: Path, *folders: Path) -> list[Path]:
    """Return a file and what it includes, directly or not, from its own folder or `folders`."""
    found = [source]
    for file in found:
        for name in _INCLUDE.findall(file.read_text()):
            paths = ((folder / name).resolve() for folder in (file.parent, *folders))
            header = next((path for path in paths if path.is_file()), None)
            if header is not None and header not in found:
                found.append(header)
    return found


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
