"""The command line, and that parallel layouts make no difference."""

import csv
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from sparsecod_mcore.scoring.measure import Request, measure
from sparsecod_mcore.scoring.results import read_scores
from sparsecod_mcore.scoring.stack import Stack
from tests.distributed.jobs import REPOSITORY, TORCHRUN, environment
from tests.scoring.compare import assert_reproduced, assert_same_figures
from tests.scoring.random_models import GQA, MOE, random_tokens, save_random_checkpoint

TOOL = str(REPOSITORY / "tools" / "measure_sparsity.py")


def measure_sparsity(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    """Run the tool in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, flags)])
    try:
        runpy.run_path(TOOL, run_name="__main__")
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_the_reference_is_reproduced(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of expected_scores.json that is measured without intervention, to 1e-4 relative."""
    folder = shared_data / "stories260k"
    flags = ("--model", folder, "--data", folder / "tokens.npy")
    assert measure_sparsity(monkeypatch, *flags, "--lengths", "64,256", "--out", tmp_path) == 0
    scores = read_scores(tmp_path / "sparsity.json")
    expected = json.loads((folder / "expected_scores.json").read_text())
    assert_reproduced(scores, expected, missing={"loss", "causal", "permutation", "usefulness", "jacobian"})
    assert scores.attention is not None and list(scores.attention.lengths) == ["64", "256"]
    assert (scores.layers, scores.sequences, scores.length) == (5, 64, 256)
    assert scores.provenance.tokens == 64 * 256
    assert sorted(path.stem for path in (tmp_path / "figures").glob("*.svg")) == ["attention", "weights"]
    rows = list(csv.DictReader((tmp_path / "sparsity.csv").open()))
    assert {row["score"] for row in rows} >= {"weight_sparsity", "attention", "moments"}

    again = measure(Request(model=str(folder), data=str(folder / "tokens.npy"), what=["entropy"]))
    assert again.weight_sparsity is None and again.moments is None
    assert again.attention is not None
    assert again.attention.lengths["256"] == scores.attention.lengths["256"]


def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random_checkpoint(GQA, tmp_path / "model")
    np.save(tmp_path / "tokens.npy", random_tokens(2, 50).numpy())
    flags = ("--model", tmp_path / "model", "--data", tmp_path / "tokens.npy", "--lengths", "40,20,20,30")
    flags = (*flags, "--what", "attention,moments", "--out")
    assert measure_sparsity(monkeypatch, *flags, tmp_path / "whole") == 0
    passed: list[int] = []
    run_layer = Stack.layer

    def layer(stack: Stack, index: int, hidden_SBD: torch.Tensor) -> torch.Tensor:
        passed.append(len(hidden_SBD))
        if passed.count(40) == 2:  # in the middle of the longest
            raise KeyboardInterrupt
        return run_layer(stack, index, hidden_SBD)

    monkeypatch.setattr(Stack, "layer", layer)
    assert measure_sparsity(monkeypatch, *flags, tmp_path / "stopped") == 130
    assert "goes on from here" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["sparsity.unfinished.json"]
    assert sorted(set(passed)) == [20, 30, 40]
    assert measure_sparsity(monkeypatch, *flags, tmp_path / "stopped") == 0
    assert passed == [20] * 3 + [30] * 3 + [40] * (2 + 3)
    for name in ("sparsity.json", "sparsity.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "stopped" / "sparsity.unfinished.json").exists()


@pytest.mark.distributed
def test_parallel_layouts_agree(tmp_path: Path) -> None:
    """TP2, DP2 with an odd number of sequences, and EP2, each resharded from a checkpoint, against one process."""
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, random_tokens(3, 50).numpy())
    checkpoints = {"tensor": tmp_path / "gqa", "data": tmp_path / "gqa", "expert": tmp_path / "moe"}
    save_random_checkpoint(GQA, checkpoints["tensor"])
    save_random_checkpoint(MOE, checkpoints["expert"])
    script = [*TORCHRUN, "--nproc-per-node", "2", str(Path(__file__).with_name("measure_layouts.py"))]
    words = [*script, *(f"{layout}={path}" for layout, path in checkpoints.items()), str(tokens), str(tmp_path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for layout, checkpoint in checkpoints.items():
        alone = measure(Request(model=str(checkpoint), data=str(tokens), lengths=[49, 20]))
        for rank in range(2):
            found = read_scores(tmp_path / f"{layout}-{rank}.json")
            assert found.provenance == alone.provenance
            assert_same_figures(found, alone, 1e-5)


MISTAKES = {
    "what": (("--what", "weights,entropi"), "'entropi' cannot be measured (did you mean 'entropy'?)"),
    "no data": (("--what", "weights,moments"), "--data is needed to measure weights, moments"),
    "no model": (("--what", "weights", "--model", "absent"), "absent does not exist"),
    "no number": (("--lengths", "64,x"), "invalid lengths value: '64,x'"),
    "no length": (("--lengths", "0", "--data", "{tokens}"), "1 or more is accepted"),
    "longer than the data": (("--lengths", "100", "--data", "{tokens}"), "fewer or shorter than"),
    "longer than the model": (("--data", "{long}"), "longer than the model's 128 positions"),
    "vocabulary": (("--data", "{foreign}"), "holds the token 97, outside of the model's vocabulary of 97"),
    "parallel": (("--what", "weights", "--tensor-parallel-size", "3"), "1 processes are not divisible"),
    "output": (("--what", "weights", "--out", "{tokens}"), "cannot be made"),
}


def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"{name}.npy" for name in ("tokens", "long", "foreign")}
    np.save(files["tokens"], random_tokens(2, 50).numpy())
    np.save(files["long"], random_tokens(2, 140).numpy())
    np.save(files["foreign"], random_tokens(2, 50).numpy() // 96 * 97)
    save_random_checkpoint(GQA, tmp_path / "model")
    for flags, complaint in MISTAKES.values():
        given = [flag.format(**files) for flag in flags]
        parallel_state.destroy_model_parallel()
        code = measure_sparsity(monkeypatch, "--model", tmp_path / "model", "--out", tmp_path / "out", *given)
        (sentence,) = re.findall(r"^error: (.*)$", capsys.readouterr().err, re.MULTILINE)
        assert code == 2 and complaint in sentence, sentence
    assert not (tmp_path / "out").exists(), "nothing is left behind"
