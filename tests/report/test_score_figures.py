import dataclasses
import math
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.report.score_figures import FIGURES, save_score_figures
from sparsecod_mcore.scoring.results import Fit, Scores, Usefulness, write_scores
from tests.scoring.example_scores import example_scores


def draw(folder: Path, scores: Scores) -> dict[str, Path]:
    """The pictures by name."""
    write_scores(folder, scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {path.name: path for path in save_score_figures(folder / "scores.json", folder / "figures")}


def test_the_file_alone_gives_every_figure_and_always_the_same(tmp_path: Path) -> None:
    scores = example_scores(layers=14, width=150)
    first = draw(tmp_path / "first", scores)
    assert sorted(first) == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))
    second = draw(tmp_path / "second", scores)
    assert all(first[name].read_bytes() == second[name].read_bytes() for name in first)


def test_heat_maps_show_the_pairs_that_were_measured(tmp_path: Path) -> None:
    """The largest figure is the darkest cell; what is not measured stays white, as do pairs that do not exist."""
    scores = example_scores(layers=3)
    assert scores.causal is not None
    scores.causal.matrix[:] = [[0.0, math.nan, 4.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    picture_HWC = matplotlib.image.imread(draw(tmp_path, scores)["causal.png"])[..., :3]
    darkest_HW = np.abs(picture_HWC - np.array([0.267, 0.005, 0.329])).max(-1) < 0.01
    rows, columns = np.nonzero(darkest_HW[:, : darkest_HW.shape[1] * 3 // 4])  # left of the colour bar
    height, width = np.ptp(rows), np.ptp(columns)
    assert len(rows) > 0.9 * height * width  # one cell
    left_of_it_HWC = picture_HWC[rows.min() : rows.max(), columns.min() - width : columns.min() - 20]
    assert left_of_it_HWC.size > 10_000 and left_of_it_HWC.min() == 1.0


@pytest.mark.parametrize("increases", [[0.0], [-0.2], [math.nan], [math.inf], [250.0]])
def test_strange_models_are_drawn(increases: list[float], tmp_path: Path) -> None:
    scores = dataclasses.replace(
        example_scores(layers=1, heads=1), usefulness=Usefulness(scored=Fit.of(increases)), weight_sparsity=None
    )
    drawn = draw(tmp_path, scores)
    assert "usefulness.png" in drawn and "causal.png" not in drawn and "weights.png" not in drawn


def test_what_is_no_file_of_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        save_score_figures(tmp_path / "scores.json", tmp_path)
