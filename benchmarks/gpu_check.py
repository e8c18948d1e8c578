"""Everything that needs a GPU, in one command and within minutes: build, test, sanitize, benchmark; one JSON of it all.

`make gpu-check` runs this. It needs no network. Exit code 0: all passed; 1: something failed; 2: there is no GPU, or no
extension with CUDA kernels and no nvcc to build it.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
SECONDS = 480.0
# The most that a step may take, and what has to remain for those after it.
BUILD_SECONDS, TEST_SECONDS, SANITIZE_SECONDS, BENCHMARK_SECONDS = 180.0, 180.0, 60.0, 150.0
SANITIZER_FAILED = 99
TOOLS = ("memcheck", "racecheck")


class UserError(Exception):
    """What stands in the way, in one sentence."""


def gpus() -> int:
    """Return the number of GPUs that the driver offers, without PyTorch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@dataclass
class Check:
    """Runs steps one after the other within a time limit, and keeps what became of them."""

    seconds: float = SECONDS
    began: float = field(default_factory=time.monotonic)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def remaining(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def run(self, step: str, command: list[str], most: float, **variables: str) -> int | None:
        """Run a step; return its exit code, or None if its time was up."""
        limit = min(most, self.remaining())
        print(f"== {step}: {' '.join(command)}", flush=True)
        began = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": search_path(), **variables}
        code: int | None = None
        if limit > 0:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
        self.record(step, code == 0, seconds=round(time.monotonic() - began, 1), exit_code=code)
        if code is None:
            print(f"{step}: out of time after {max(limit, 0):.0f} s")
        return code

    def record(self, step: str, passed: bool, **found: Any) -> None:
        self.steps[step] = {"passed": passed, **found}

    def skip(self, step: str, reason: str) -> None:
        print(f"== {step}: skipped, {reason}")
        self.steps[step] = {"skipped": reason}

    def passed(self) -> bool:
        return all(found.get("passed", True) for found in self.steps.values())


def search_path() -> str:
    """Return a PYTHONPATH by which the package of this tree is found first, installed or not."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def python(program: str) -> str:
    """Return what a Python program prints: empty if it fails."""
    environment = {**os.environ, "PYTHONPATH": search_path()}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def build(check: Check) -> None:
    """Build the extension with CUDA kernels where nvcc is; else see that there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc"):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if check.run("build", command, BUILD_SECONDS, SPARSECOD_CUDA="on") != 0:
            return
    else:
        check.skip("build", "there is no nvcc: using the extension that is here")
    if python("import sparsecod_mcore.ops; print(sparsecod_mcore._C.HAS_CUDA)") != "True":
        raise UserError(
            "the extension of sparsecod_mcore does not load here or has no CUDA kernels: put nvcc on PATH or set "
            "CUDA_HOME, or bring an extension that was built with SPARSECOD_CUDA=on"
        )


def test(check: Check) -> None:
    """Run the tests that are marked gpu."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "tests/ops", f"--junitxml={report}"]
        if not python("import pytest_timeout; print(1)"):  # whose option in pyproject.toml would be an error
            command += ["-o", "addopts=-ra --import-mode=importlib"]
        check.run("tests", command, min(TEST_SECONDS, check.remaining() - BENCHMARK_SECONDS))
        if report.exists():
            suite = ElementTree.parse(report).getroot().find("testsuite")
            counts = {} if suite is None else suite.attrib
            for name in ("tests", "failures", "errors", "skipped"):
                check.steps["tests"][name] = int(counts.get(name, 0))


def sanitize(check: Check) -> None:
    """Run a small input of every operator under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    for name in TOOLS:
        if tool is None:
            check.skip(name, "there is no compute-sanitizer")
            continue
        command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_FAILED)]
        command += [sys.executable, "-m", "tests.gpu.smoke"]
        # Each tensor an allocation of its own: memcheck sees nothing inside PyTorch's large blocks.
        limit = min(SANITIZE_SECONDS, check.remaining() - BENCHMARK_SECONDS)
        check.run(name, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmark(check: Check) -> dict[str, Any]:
    """Time every operator; return what benchmarks/operators.py writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "operators.json"
        command = [sys.executable, "benchmarks/operators.py", "--device", "cuda", "--json", str(path)]
        command += ["--seconds", "0.5"]
        check.run("benchmarks", command, check.remaining())
        return json.loads(path.read_text()) if path.exists() else {}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="JSON", help="default: benchmarks/results/gpu_check_DEVICE.json")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    check = Check()
    try:
        if gpus() == 0:
            raise UserError("this machine has no GPU that NVIDIA's driver offers")
        if python("import torch; print(torch.cuda.is_available())") != "True":
            raise UserError(f"{sys.executable} has no PyTorch that finds the GPU")
        build(check)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {}
    if check.passed():
        test(check)
        sanitize(check)
        result = benchmark(check)
    seconds = round(time.monotonic() - check.began, 1)
    result = {**result, "benchmark": "gpu_check", "passed": check.passed(), "seconds": seconds, "steps": check.steps}
    device = result.get("device", "unknown").replace(" ", "_")
    path = arguments.output or RESULTS / f"gpu_check_{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    failed = [step for step, found in check.steps.items() if not found.get("passed", True)]
    print(f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'passed'} in {seconds:.0f} s; wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
