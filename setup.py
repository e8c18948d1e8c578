"""Builds the extension `sparsecod_mcore._C`; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent


def files(*patterns: str) -> list[str]:
    """Return the files under csrc/ that match, relative to this file as setuptools wants them."""
    paths = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


extension = CppExtension(
    "sparsecod_mcore._C",
    sources=files("cpu/*.cpp", "bindings/*.cpp"),
    depends=files("**/*.h"),
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",  # not linked: at::parallel_for is to use the OpenMP, and so the threads, of PyTorch
        "-Wall",
        "-Wno-psabi",  # vectors never cross a call, so their calling convention does not matter
    ],
)


class IncrementalBuild(BuildExtension):
    """Keeps objects where editable installs find them again, so that only what changed is compiled."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build")


setup(ext_modules=[extension], cmdclass={"build_ext": IncrementalBuild})
