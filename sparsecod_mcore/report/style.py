"""What all figures have in common: how they look, and how they are saved."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from sparsecod_mcore.data.atomic import publish, temporary

# Even in lightness, without the pale end that white paper swallows.
EVEN_COLOURS = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.9, 0.0, 256)))
MAX_LAYERS_SHOWN = 8
MAX_MARKERS = 12
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.hashsalt": "sparsecod_mcore",  # the same run gives the same file
}


def layers_shown(num_layers: int) -> list[int]:
    """The first, the last and some evenly between, where there is no room for all."""
    return np.unique(np.linspace(0, num_layers - 1, MAX_LAYERS_SHOWN).round().astype(int)).tolist()


def mark_every(num_points: int) -> int:
    """Each how many-th point of a line gets its marker."""
    return -(-num_points // MAX_MARKERS)


def save(figure: Figure, output_stem: Path) -> list[Path]:
    """Write the figure as `output_stem` with the suffixes png and svg, each wholly or not at all."""
    output_stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
        path = output_stem.with_name(f"{output_stem.name}.{kind}")
        figure.savefig(temporary(path), format=kind, **options)
        publish(path)
        written.append(path)
    return written
