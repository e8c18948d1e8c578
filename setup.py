"""Builds the extension `sparsecod_mcore._C`; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent


def files(*patterns: str) -> list[str]:
    """Return the files under csrc/ that match, relative to this file as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))


extension = CppExtension(
    "sparsecod_mcore._C",
    sources=files("cpu/*.cpp", "bindings/*.cpp"),
    depends=files("**/*.h"),
    extra_compile_args=[
        "-O3",
        "-std=c++17",
        "-fopenmp",  # not linked: at::parallel_for is to use the runtime, and so the threads, that PyTorch has loaded
        "-g0",
        "-Wno-psabi",  # lanes never cross a function that is not inlined
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
    ],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
