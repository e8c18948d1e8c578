"""The demo's scores are those of the weights that it has, and its report is of both models."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest

from sparsecod_mcore import demo
from sparsecod_mcore.scoring.provenance import hash_files
from sparsecod_mcore.scoring.results import write_scores
from tests.report.example_runs import write_example_run
from tests.scoring.example_scores import example_scores


def test_scores_of_other_weights_are_out_of_date(tmp_path: Path) -> None:
    model, scores = tmp_path / "model", tmp_path / "scores" / "scores.json"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, '
        '"num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 97, "max_position_embeddings": 64}'
    )
    weights = model / "model.safetensors"
    weights.write_bytes(b"as they were")
    assert not demo._are_of_present_weights(scores, model)
    example = example_scores()
    provenance = replace(example.provenance, model_sha256=hash_files(model.iterdir()))
    write_scores(scores.parent, replace(example, provenance=provenance))
    assert demo._are_of_present_weights(scores, model)
    weights.write_bytes(b"as they are")
    assert not demo._are_of_present_weights(scores, model)
    scores.write_text("{}")
    assert not demo._are_of_present_weights(scores, model)


def test_both_models_are_trained_scored_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With training and scoring stood in for: what they are asked to do, and what is made of what they leave."""
    commands = []

    def run(work: dict[str, Iterable[list[str]]]) -> None:
        assert list(work) == ["naive", "recipe"]
        for command in chain.from_iterable(work.values()):
            named = dict(pairwise(command))
            commands.append(named)
            if "--cod-run-dir" in named:
                write_example_run(Path(named["--cod-run-dir"]), layers=3, steps=12, scores=False)
            else:
                write_scores(Path(named["--out"]), example_scores(layers=3))

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {number}th sentence of a short text.\n" * 20 for number in range(200)))
    monkeypatch.setattr(demo, "run_side_by_side", run)
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    monkeypatch.setattr(demo, "VOCABULARY_SIZE", 300)
    monkeypatch.chdir(tmp_path)
    configs = Path(__file__).parents[1] / "examples"
    (tmp_path / "examples").symlink_to(configs)
    demo.run_demo(str(text), None)
    [folder] = (tmp_path / "runs").iterdir()
    trained, scored = commands[::2], commands[1::2]
    assert [Path(named["--cod-run-dir"]).name for named in trained] == ["naive", "recipe"]
    assert [(named["--length"], named["--sequences"]) for named in scored] == [("128", "16"), ("256", "8")]
    assert all("--scores" not in named for named in scored)  # all that the model has
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out.splitlines()[-1]
    page = (folder / "report.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in ("naive", "recipe"))
