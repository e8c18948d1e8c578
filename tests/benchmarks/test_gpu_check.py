"""What `make gpu-check` does around its steps: says what is missing, keeps to its time, and tells what failed."""

import json
import sys

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Check


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    return gpu_check.main()


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "gpus", lambda: 0)
    assert run_main(monkeypatch) == 2
    assert capsys.readouterr().err == "error: this machine has no GPU that NVIDIA's driver offers\n"


def test_without_nvcc_the_extension_that_is_here_is_used(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    check = Check()
    monkeypatch.setattr(gpu_check, "python", lambda program: "True")
    gpu_check.build(check)
    assert check.passed() and "there is no nvcc" in check.steps["build"]["skipped"]
    monkeypatch.setattr(gpu_check, "python", lambda program: "False")
    with pytest.raises(gpu_check.UserError, match="has no CUDA kernels"):
        gpu_check.build(check)


def test_without_compute_sanitizer(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    check = Check()
    gpu_check.sanitize(check)
    assert check.passed() and set(check.steps) == {"memcheck", "racecheck"}


@pytest.mark.parametrize(
    ("program", "most", "code"), [("pass", 60, 0), ("exit(3)", 60, 3), ("while True: pass", 1, None)]
)
def test_a_step_that_fails_or_takes_too_long(program, most, code):
    check = Check()
    assert check.run("step", [sys.executable, "-c", program], most) == code
    assert check.steps["step"]["exit_code"] == code
    assert check.passed() == (code == 0)


def test_no_step_starts_when_the_time_is_up():
    check = Check(seconds=0.0)
    assert check.run("step", [sys.executable, "-c", "pass"], 60) is None
    assert not check.passed()


@pytest.mark.parametrize("test_passes", [True, False])
def test_the_result_tells_what_failed(monkeypatch, tmp_path, capsys, test_passes):
    monkeypatch.setattr(gpu_check, "gpus", lambda: 1)
    monkeypatch.setattr(gpu_check, "python", lambda program: "True")
    monkeypatch.setattr(gpu_check, "build", lambda check: check.record("build", True))
    monkeypatch.setattr(gpu_check, "test", lambda check: check.record("tests", test_passes, failures=3))
    monkeypatch.setattr(gpu_check, "sanitize", lambda check: check.skip("memcheck", "no tool"))
    monkeypatch.setattr(gpu_check, "benchmark", lambda check: {"device": "A GPU", "rows": []})
    path = tmp_path / "result.json"
    assert run_main(monkeypatch, "--output", str(path)) == (0 if test_passes else 1)
    result = json.loads(path.read_text())
    assert result["passed"] == test_passes and result["device"] == "A GPU"
    assert result["steps"]["tests"] == {"passed": test_passes, "failures": 3}
    assert ("failed: tests" in capsys.readouterr().out) == (not test_passes)
