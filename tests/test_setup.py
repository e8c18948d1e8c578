"""What setup.py says of SPARSECOD_CUDA before it builds anything."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"


def run_setup(**variables: str) -> subprocess.CompletedProcess[str]:
    """Ask for the project's name, which builds nothing, where no nvcc is on PATH."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    environment |= {"PATH": "", **variables}
    command = [sys.executable, str(SETUP), "--name"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SETUP.parent)


def the_only_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    lines = [line for line in done.stderr.strip().splitlines() if not re.match(r"W\d+ .*torch/", line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_cuda_on_without_nvcc():
    reason = r"nvcc is not on PATH, nor CUDA_HOME set|torch \S+ is built without CUDA"
    assert re.fullmatch(f"error: SPARSECOD_CUDA is on, but ({reason})", the_only_line(run_setup(SPARSECOD_CUDA="on")))


def test_cuda_on_with_a_cuda_home_that_is_none(tmp_path):
    reason = f"CUDA_HOME is {tmp_path}, where bin/nvcc is not|torch \\S+ is built without CUDA"
    told = the_only_line(run_setup(SPARSECOD_CUDA="on", CUDA_HOME=str(tmp_path)))
    assert re.fullmatch(f"error: SPARSECOD_CUDA is on, but ({reason})", told)


def test_a_value_that_means_nothing():
    told = the_only_line(run_setup(SPARSECOD_CUDA="yes"))
    assert told == "error: SPARSECOD_CUDA is 'yes', but must be auto, on or off"


def test_auto_without_nvcc_says_what_it_leaves_out():
    done = run_setup(SPARSECOD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("sparsecod_mcore: building without CUDA kernels, for ")
    assert done.stdout.splitlines()[-1] == "sparsecod_mcore"


@pytest.mark.skipif(shutil.which("nvcc") is None or torch.cuda.is_available(), reason="needs nvcc, and no GPU")
def test_auto_without_a_gpu_says_how_to_build_all_the_same():
    told = run_setup(SPARSECOD_CUDA="auto", PATH=os.environ["PATH"]).stdout.splitlines()[0]
    reason = r"there is no GPU here \(SPARSECOD_CUDA=on builds them all the same\)|torch .*|nvcc is of CUDA .*"
    assert re.fullmatch(f"sparsecod_mcore: building without CUDA kernels, for ({reason})", told)
