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


def only(scores: Scores, *sections: str) -> Scores:
    """Without the other sections: a picture takes its time."""
    dropped = {field.name: None for field in dataclasses.fields(scores) if field.default is None}
    return dataclasses.replace(scores, **{name: None for name in dropped.keys() - set(sections)})


def test_the_file_alone_gives_every_figure_and_always_the_same(tmp_path: Path) -> None:
    scores = example_scores(width=8)
    first = draw(tmp_path / "first", scores)
    assert sorted(first) == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))
    second = draw(tmp_path / "second", only(scores, "causal", "attention"))
    assert len(second) == 4 and all(first[name].read_bytes() == path.read_bytes() for name, path in second.items())


def test_wide_jacobians_keep_their_diagonal(tmp_path: Path) -> None:
    """Of 300 x 300 entries the picture shows the largest of each 3 x 3."""
    scores = example_scores(layers=1, width=300)
    assert scores.jacobian is not None
    matrix_DD = np.full((300, 300), 1e-3)
    np.fill_diagonal(matrix_DD, -1.0)
    layer = dataclasses.replace(scores.jacobian.layers[0], matrix=matrix_DD.tolist())
    scores = dataclasses.replace(scores, jacobian=dataclasses.replace(scores.jacobian, layers=[layer]))
    picture_HWC = matplotlib.image.imread(draw(tmp_path, only(scores, "jacobian"))["jacobian_matrices.png"])[..., :3]
    left_HWC = picture_HWC[:, : picture_HWC.shape[1] * 3 // 5]  # of the colour bar
    blue_HW = left_HWC[..., 2] - left_HWC[..., 0] > 0.2
    rows = np.flatnonzero(blue_HW.any(1))
    assert len(rows) == np.ptp(rows) + 1 > 300 and blue_HW.mean() < 0.05


def test_heat_maps_show_the_pairs_that_were_measured(tmp_path: Path) -> None:
    """The largest figure is the darkest cell; what is not measured stays white, as do pairs that do not exist."""
    scores = only(example_scores(layers=3), "causal")
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
    scores = only(example_scores(layers=1), "causal")
    drawn = draw(tmp_path, dataclasses.replace(scores, usefulness=Usefulness(scored=Fit.of(increases))))
    assert sorted(drawn) == ["usefulness.png", "usefulness.svg"]


def test_what_is_no_file_of_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        save_score_figures(tmp_path / "scores.json", tmp_path)
