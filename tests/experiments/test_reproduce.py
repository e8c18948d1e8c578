"""One question from text to verdict, in real runs of a model that trains in a blink."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.experiments.reproduce import reproduce  # noqa: E402
from sparsecod_mcore.experiments.sizes import MICRO, SMALL  # noqa: E402

TINY = replace(
    MICRO, name="tiny", layers=2, hidden=16, ffn=32, heads=2, kv_heads=(2, 1, 1), expert_ffn=16, experts=4,
    vocabulary=512, lengths=(16, 32, 64), seq_length=32, tokens=32 * 8 * 6, eval_tokens=32 * 8, scored_sequences=2,
    rest=MICRO.rest | {"vocab_size": 512, "log_interval": 2},
)  # fmt: skip


@pytest.mark.slow
def test_a_question_is_answered_and_not_asked_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    corpora = tmp_path / "texts"
    corpora.mkdir()
    for part in range(40):
        (corpora / f"{part}.txt").write_text("".join(f"Part {part}, line {n}: {n * part} things.\n" for n in range(60)))
    (answer,) = reproduce(TINY, ["mixture_of_experts"], corpus_path=f"{corpora}/*.txt", seeds=[1])
    (folder,) = (tmp_path / "runs").iterdir()
    rows = pq.read_table(folder / "results_mixture_of_experts.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["complete", "complete"]
    dense, experts = rows
    mlp, expert = 3 * TINY.hidden * TINY.ffn, 3 * TINY.hidden * TINY.expert_ffn
    added = TINY.experts * (expert + TINY.hidden) - mlp  # with the router's row for each
    assert experts["parameters"] - dense["parameters"] == TINY.layers * added
    for measure in ("last_layer_variance", "perplexity", "causal", "permutation", "usefulness", "attention_entropy"):
        assert dense[measure] is not None and dense[measure] >= 0, measure
    assert [finding.verdict for finding in answer.findings] == ["not at this size"] * 5  # one seed tells nothing
    report = (folder / "report" / "report.md").read_text()
    assert "| dense |" in report
    assert f"--size tiny --corpus '{corpora}/*.txt' --seeds 1 --question mixture_of_experts\n" in report
    assert f"--model runs/{folder.name}/$run-seed=$seed --data runs/{folder.name}/data/text" in report
    written = (folder / rows[0]["run"] / "log.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    reproduce(TINY, ["mixture_of_experts"], corpus_path=f"{corpora}/*.txt", seeds=[1])
    assert "2 of 2 runs are complete already" in capsys.readouterr().out
    assert (folder / rows[0]["run"] / "log.jsonl").stat().st_mtime_ns == written


@pytest.mark.skipif(platform.has_gpu(), reason="this machine has a GPU")
def test_small_is_refused_without_a_gpu() -> None:
    with pytest.raises(UserError, match=r"^size small is for a GPU, and this machine has none; micro is for CPUs$"):
        reproduce(SMALL, ["weight_decay"])
