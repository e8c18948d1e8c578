"""The report is one whole page, says the runs' own figures, and copes with runs that are not whole."""

import dataclasses
import errno
import json
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.monitor.parquet import read_statistics
from sparsecod_mcore.report.gather import gather
from sparsecod_mcore.report.page.command import make_report
from sparsecod_mcore.report.page.page import FIGURES, render, write_report
from sparsecod_mcore.scoring.results import read_scores, write_scores
from tests.report.example_runs import LADDER, write_example_run, write_ladder
from tests.report.page_parts import Page


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_ladder(tmp_path_factory.mktemp("ladder"), layers=4, steps=40)


@pytest.fixture(scope="module")
def page(ladder: list[Path]) -> Page:
    return Page(render(gather(ladder)))


def test_every_figure_says_what_to_see_and_holds_its_data(page: Page) -> None:
    figures = [found["id"] for found in page.all("figure")]
    assert len(figures) == len(FIGURES) == len(set(figures))
    for figure in figures:
        rows = page.data(figure)
        assert rows and all(row.get("run") in LADDER for row in rows), figure
    plots = page.all("div", class_="plot")
    assert len(plots) == len(page.hovers()) and all(plot["aria-label"] and plot["tabindex"] == "0" for plot in plots)
    targets = {found["href"].removeprefix("#") for found in page.all("a") if found["href"].startswith("#")}
    assert targets <= {found["id"] for _, found in page.tags if "id" in found}


def test_nothing_is_loaded_from_elsewhere(ladder: list[Path]) -> None:
    html = render(gather(ladder))
    assert not re.search(r"https?://|url\(|@import|\ssrc=\"(?!data:)", html)
    assert len(html) < 5e6
    assert html == render(gather(ladder)), "the same runs give the same page"


def test_figures_are_those_of_the_runs(page: Page, ladder: list[Path]) -> None:
    curve = [row for row in page.data("last-layer-variance") if row["run"] == "deep" and "variance" in row["quantity"]]
    statistics = read_statistics(ladder[1] / "stats").series("layer_output", "variance")
    assert [float(row["value"]) for row in curve] == pytest.approx(statistics.values_IL[:, -1], rel=1e-5)
    assert [int(row["tokens"]) for row in curve] == statistics.tokens_I.tolist()
    shares = [row for row in page.data("growth") if row["run"] == "baseline"]
    parts = np.array([list(row.values())[2:] for row in shares], dtype=float)
    assert parts.sum() == pytest.approx(1, rel=1e-4)
    assert parts.sum(axis=0) == pytest.approx([0.3, 0.7, 0.1, -0.1], rel=1e-4)  # as example_runs makes them
    scores = read_scores(ladder[0] / "scores" / "scores.json")
    assert scores.causal is not None
    pairs = {(row["layer"], row["other layer"]): float(row[list(row)[3]]) for row in page.data("causal")[:6]}
    assert pairs["0", "3"] == pytest.approx(scores.causal.matrix[0][3], rel=1e-5) and len(pairs) == 6


def test_hovering_says_what_is_drawn(page: Page, ladder: list[Path]) -> None:
    scores = read_scores(ladder[0] / "scores" / "scores.json")
    assert scores.causal is not None
    cells = [hover for hover in page.hovers() if hover["kind"] == "cell" and hover["rows"][0] == "layer skipped 0"]
    assert len(cells) == len(LADDER) and cells[0]["columns"] == [f"layer affected {at}" for at in (1, 2, 3)]
    shown = np.array(cells[0]["cells"], dtype=float)
    assert shown[0] == pytest.approx(scores.causal.matrix[0][1:], rel=1e-2) and np.isnan(shown[2, :2]).all()
    maps = [hover for hover in page.hovers() if hover["kind"] == "cell" and hover["rows"][0] == "layer 3"]
    variance = read_statistics(ladder[0] / "stats").series("layer_output", "variance").values_IL
    assert np.array(maps[0]["cells"], dtype=float) == pytest.approx(variance.T[::-1], rel=1e-2)


def test_names_with_html_are_escaped(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>&\"'</script>"
    run = write_example_run(tmp_path / name.replace("/", "∕"), layers=3, steps=12, settings={"<b>": "<i>x"})
    scores = read_scores(run / "scores" / "scores.json")
    provenance = dataclasses.replace(scores.provenance, data="<svg onload=alert(2)>", versions={"<u>": "<s>"})
    write_scores(run / "scores", dataclasses.replace(scores, provenance=provenance))
    evaluation = {"tasks": {"<em>": {"metric": "<q>", "metrics": {}}}}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    other = write_example_run(tmp_path / "other", layers=3, steps=12)
    page = Page(render(gather([run, other])))
    assert not {"b", "i", "u", "s", "em", "q"} & {tag for tag, _ in page.tags} - {"b", "i"}
    assert all(found["src"].startswith("data:image/png") for found in page.all("img"))
    assert not any(key.startswith("on") for _, found in page.tags for key in found)
    words = page.words()
    assert all(text in words for text in ("<img src=x onerror=alert(1)>&\"'<∕script>", "<i>x", "<em>, <q>", "<u> <s>"))
    assert any(series["name"].startswith("<img") for hover in page.hovers() for series in hover.get("series", ()))


def test_a_killed_run_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_example_run(tmp_path / "killed", layers=3, steps=30, target=90, probes=False, scores=False)
    whole = write_example_run(tmp_path / "whole", layers=3, steps=12)
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(log[: log.index('{"iteration": 30, "val')] + '{"iteration": 31, "los')
    parts = sorted((run / "stats").iterdir())
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    make_report([run, whole], tmp_path / "out" / "report.html")
    said = capsys.readouterr().out
    assert f"1 of {len(parts)} parts of stats/ cannot be read and were skipped: {parts[1].name}." in said
    assert "Training stands at step 30 of 90" in said and "1 line of log.jsonl cannot be read" in said
    page = Page((tmp_path / "out" / "report.html").read_text())
    words = page.words()
    for text in (
        "training is unfinished", "files are damaged", parts[1].name, "Never validated", "Not scored",
        "Jacobians were not probed", "not scored", "Not measured: killed.",
    ):  # fmt: skip
        assert text in words, text
    iterations = {int(row["tokens"]) for row in page.data("variance-map") if row["run"] == "killed"}
    first, last = map(int, re.findall(r"\d+", parts[1].name))
    assert len(iterations) == 30 - (last - first + 1) and not iterations & {4096 * first, 4096 * last}


def test_next_to_nothing_is_still_a_report(tmp_path: Path) -> None:
    for name, content in (("empty.yaml", {}), ("broken", {"config.yaml": "{", "log.jsonl": "\x00\n[]\n7\n"})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("[]")
        for file, text in content.items():
            (folder / file).write_text(text)
        (folder / "scores").mkdir()
        (folder / "scores" / "scores.json").write_text('{"schema_version": 1}')
        (folder / "evaluation.json").write_text("]")
    words = Page(render(gather([tmp_path / "empty.yaml", tmp_path / "broken"]))).words()
    for text in (
        "scores/scores.json is damaged",
        "3 lines of log.jsonl",
        "it is no YAML",
        "evaluation.json is damaged",
    ):
        assert text in words, text
    assert len(FIGURES) == words.count(": train with") + words.count(": tools/")


def test_scores_by_themselves_join_their_run(tmp_path: Path) -> None:
    run = write_example_run(tmp_path / "mine", layers=3, steps=12)
    scores = read_scores(run / "scores" / "scores.json")
    (run / "scores").rename(tmp_path / "scored")
    provenance = dataclasses.replace(scores.provenance, model=str(run / "checkpoints"))
    write_scores(tmp_path / "scored", dataclasses.replace(scores, provenance=provenance))
    [found] = gather([tmp_path / "scored" / "scores.json", run])
    assert found.is_run and found.scores is not None and found.name == "mine"
    [alone] = gather([tmp_path / "scored"])
    assert not alone.is_run and "Only scores are given" in Page(render([alone])).words()


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, 1e-300, 1e300])
def test_strange_figures_are_drawn(value: float, tmp_path: Path) -> None:
    """Of one layer, or of a run that diverged or does nothing."""
    paths = [write_example_run(tmp_path / str(layers), layers=layers, steps=3) for layers in (1, 3)]
    runs = gather(paths)
    for run in runs:
        assert run.scores is not None and run.scores.usefulness is not None
        for series in run.series.values():
            series.values_IL[-2:] = value
        run.scores.usefulness.scored.relative_loss_increase[:] = [value] * run.scores.layers
        run.log.steps[-1]["loss"] = str(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(render(runs))
    assert "NaN" not in "".join(page.scripts)  # which no JSON parser takes
    assert len(page.hovers()) == len(page.all("div", class_="plot"))


def test_other_paths_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds neither a run"):
        gather([tmp_path])


def test_a_place_where_no_report_can_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_example_run(tmp_path / "run", layers=2, steps=12)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .* is a folder; a file is wanted, such as .*run/report\.html"):
        write_report([run], run)
    with pytest.raises(UserError, match=r"cannot be made: .*/file is a file"):
        write_report([run], tmp_path / "file" / "report.html")
    with monkeypatch.context() as full:
        full.setattr("os.fsync", _no_space)
        with pytest.raises(UserError, match=r"report\.html cannot be written \(No space left on device\)"):
            write_report([run], tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def _no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
