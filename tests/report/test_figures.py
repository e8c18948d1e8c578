import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from sparsecod_mcore.monitor.parquet import ParquetSink
from sparsecod_mcore.report.figures import STREAM_STYLES, save_variance_figure
from tests.report.variance_run import write_run


@pytest.mark.parametrize(("num_layers", "num_iterations"), [(1, 1), (4, 30), (40, 5)])
def test_png_and_svg_are_drawn(tmp_path: Path, num_layers: int, num_iterations: int) -> None:
    write_run(tmp_path, num_layers=num_layers, num_iterations=num_iterations)
    png, svg = save_variance_figure(tmp_path, tmp_path / "figures" / "variance")
    assert sorted((tmp_path / "figures").iterdir()) == [png, svg]
    pixels_HWC = matplotlib.image.imread(png)
    for style in STREAM_STYLES.values():
        colour = np.array([int(style["color"][i : i + 2], 16) for i in (1, 3, 5)]) / 255
        is_drawn = np.abs(pixels_HWC[..., :3] - colour).max(axis=-1) < 0.01
        assert is_drawn.sum() > 50, f"{style['label']} is not to be seen"
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_layers_of_zeros_and_diverged_layers_leave_gaps(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "stats", 0)
    values_L = np.array([0.0, 1.0, np.nan, np.inf])
    for iteration in range(1, 4):
        sink.append(iteration, iteration, {(stream, "variance"): values_L for stream in STREAM_STYLES})
    sink.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(path.stat().st_size > 0 for path in save_variance_figure(tmp_path, tmp_path / "variance"))


def test_the_same_run_gives_the_same_files(tmp_path: Path) -> None:
    write_run(tmp_path, num_layers=3, num_iterations=4)
    first = [path.read_bytes() for path in save_variance_figure(tmp_path, tmp_path / "first")]
    second = [path.read_bytes() for path in save_variance_figure(tmp_path, tmp_path / "second")]
    assert first == second
