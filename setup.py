"""Builds the extension `sparsecod_mcore._C`; everything else about the package stands in pyproject.toml.

SPARSECOD_CUDA=auto|on|off   CUDA kernels where a GPU, nvcc and a CUDA build of torch are found (auto); always (on), as
                             for containers and login nodes, whose GPUs are elsewhere; or never (off)
SPARSECOD_CUDA_ARCH=90a      architectures to compile for, separated by semicolons: 80 Ampere, 90a Hopper, 100 Blackwell
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",  # not linked: at::parallel_for is to use the OpenMP, and so the threads, of PyTorch
    "-Wall",
    "-Wno-psabi",  # vectors never cross a call, so their calling convention does not matter
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]


def files(*patterns: str) -> list[str]:
    """Return the files under csrc/ that match, relative to this file as setuptools wants them."""
    paths = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def cuda_home() -> str | None:
    """Return the root of the CUDA toolkit whose nvcc is found, be that a wrapper elsewhere, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else None


def why_no_cuda() -> str | None:
    """Return what stands in the way of CUDA kernels, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = cuda_home()
    if home is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        return f"CUDA_HOME is {named}, where bin/nvcc is not" if named else "nvcc is not on PATH, nor CUDA_HOME set"
    told = subprocess.run([str(Path(home) / "bin" / "nvcc"), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", told)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1] if release else '?'}, torch {torch.__version__} of {torch.version.cuda}"
    return None


def with_cuda() -> bool:
    wanted = os.environ.get("SPARSECOD_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"error: SPARSECOD_CUDA is {wanted!r}, but must be auto, on or off")
    if wanted == "off":
        return False
    obstacle = why_no_cuda()
    if wanted == "auto" and obstacle is None and not torch.cuda.is_available():
        obstacle = "there is no GPU here (SPARSECOD_CUDA=on builds them all the same)"
    if obstacle and wanted == "on":
        raise SystemExit(f"error: SPARSECOD_CUDA is on, but {obstacle}")
    print(f"sparsecod_mcore: building without CUDA kernels, for {obstacle}" if obstacle else "with CUDA kernels")
    return obstacle is None


def extension() -> Extension:
    sources, headers = files("cpu/*.cpp", "bindings/*.cpp"), files("**/*.h")
    if not with_cuda():
        return cpp_extension.CppExtension(
            "sparsecod_mcore._C", sources=sources, depends=headers, extra_compile_args=CXX_FLAGS
        )
    cpp_extension.CUDA_HOME = cuda_home()
    architectures = os.environ.get("SPARSECOD_CUDA_ARCH", "90a").split(";")
    if not all(re.fullmatch(r"\d+a?", number) for number in architectures):
        raise SystemExit(f"error: SPARSECOD_CUDA_ARCH is {';'.join(architectures)!r}, but must be like 90a or 80;90a")
    generate = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    return cpp_extension.CUDAExtension(
        "sparsecod_mcore._C",
        sources=[*sources, *files("cuda/*.cu")],
        depends=headers,
        define_macros=[("SPARSECOD_CUDA", "1")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, *generate]},
    )


class IncrementalBuild(cpp_extension.BuildExtension):
    """Keeps objects where editable installs find them again, so that only what changed is compiled."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build")


setup(ext_modules=[extension()], cmdclass={"build_ext": IncrementalBuild})
