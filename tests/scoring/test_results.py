import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring.results import Fit, Similarity, read_scores, write_scores
from sparsecod_mcore.scoring.schema import Malformed
from tests.scoring.example_scores import example_scores


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    scores = example_scores()
    write_scores(tmp_path / "a", scores)
    again = read_scores(tmp_path / "a" / "scores.json")
    assert again == scores
    write_scores(tmp_path / "b", again)
    for name in ("scores.json", "scores.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["scores.csv", "scores.json"]


def test_figures_that_are_not_there_are_null(tmp_path: Path) -> None:
    scores = example_scores()
    assert scores.causal is not None
    scores.causal.matrix[0][1] = math.nan
    write_scores(tmp_path, scores)
    assert json.loads((tmp_path / "scores.json").read_text())["causal"]["matrix"][0][1] is None
    again = read_scores(tmp_path / "scores.json")
    assert again.causal is not None and math.isnan(again.causal.matrix[0][1])


def test_the_table_has_a_row_per_figure(tmp_path: Path) -> None:
    scores = example_scores()
    assert scores.causal is not None and scores.attention is not None and scores.moments is not None
    write_scores(tmp_path, scores)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))

    def values(**wanted: str) -> list[float]:
        return [float(row["value"]) for row in rows if all(row[name] == value for name, value in wanted.items())]

    pairs = [(i, j) for i in range(scores.layers) for j in range(i + 1, scores.layers)]
    assert values(score="causal", statistic="matrix") == [scores.causal.matrix[i][j] for i, j in pairs]
    assert values(score="causal", layer="1", other_layer="3") == [scores.causal.matrix[1][3]]
    assert len(values(score="similarity", statistic="matrix")) == scores.layers**2
    heads = scores.attention.lengths["64"].sparsity_causal_heads["0.01"]
    found = values(score="attention", length="64", threshold="0.01", layer="2", item="1")
    assert found == [heads[2][1]]
    found = values(score="moments", statistic="streams.variance", layer="3", item="mlp")
    assert found == [scores.moments.streams["mlp"]["variance"][3]]
    assert not values(statistic="matrix", score="jacobian")
    keys = [tuple(row.values())[:-1] for row in rows]
    assert len(keys) == len(set(keys))


def test_a_fit_counts_layers_above_thresholds() -> None:
    fit = Fit.of([0.3, 0.05, 0.1, -0.02])
    assert fit.score == 0.25  # 0.1 is not above 0.1
    assert fit.curve["0.0"] == 0.75 and fit.curve["0.02"] == 0.75 and fit.curve["0.2"] == 0.25
    assert fit.sorted_increases == [0.3, 0.1, 0.05, -0.02]
    assert fit.mean == pytest.approx(0.1075)


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda c: c.update(schema_version=99), "schema 1 (its schema_version: 99)"),
    "unknown": (lambda c: c.update(casual=1), "unknown entry 'casual' (did you mean 'causal'?)"),
    "missing": (lambda c: c["causal"].pop("score"), "causal lacks 'score'"),
    "type": (lambda c: c["causal"].update(score="1"), "causal.score is '1', not a number"),
    "truth": (lambda c: c["causal"].update(score=True), "causal.score is True, not a number"),
    "float for integer": (lambda c: c.update(layers=4.0), "layers is 4.0, not an integer"),
    "null for object": (lambda c: c.update(provenance=None), "provenance is None, not an object"),
    "choice": (lambda c: c["provenance"].update(dtype="int8"), "provenance.dtype is 'int8', not one of 'float32'"),
    "ragged": (lambda c: c["permutation"]["matrix"][1].pop(), "a list of 3 by layer, but the number of layers is 4"),
    "layers": (lambda c: c.update(layers=5), "a list of 4 by layer, but the number of layers is 5"),
    "heads": (
        lambda c: c["attention"]["lengths"]["64"]["entropy_heads"][3].append(1.0),
        "attention.lengths.entropy_heads has a list of 3 by head, but that of attention.lengths.entropy_heads is 2",
    ),
    "range": (lambda c: c["usefulness"]["scored"].update(score=1.5), "usefulness.scored.score is 1.5, not from 0 to 1"),
    "no such layer": (lambda c: c["moe"]["layers"].update({"7": c["moe"]["layers"]["1"]}), "a layer '7'"),
    "depth": (lambda c: c["effective_depth"].update(wasted=3), "effective_depth has 3 + 3 layers, the model 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_malformed_files_are_refused(mistake: str, tmp_path: Path) -> None:
    spoil, complaint = MISTAKES[mistake]
    write_scores(tmp_path, example_scores())
    path = tmp_path / "scores.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_scores(path)
    assert complaint in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    for content, complaint in (("{", "not valid JSON"), ("[]", "holds no JSON object"), ("{}", "schema_version: None")):
        path.write_text(content)
        with pytest.raises(UserError, match=complaint):
            read_scores(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_scores(tmp_path / "absent.json")


def test_malformed_scores_are_not_written(tmp_path: Path) -> None:
    scores = dataclasses.replace(example_scores(), similarity=Similarity(matrix=[[1.0]]))
    with pytest.raises(Malformed, match=r"similarity\.matrix"):
        write_scores(tmp_path, scores)
    assert not list(tmp_path.iterdir())
