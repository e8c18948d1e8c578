"""Charts as fragments of HTML: a plot that stretches to any width, with text that does not.

A plot is an SVG (or, of heat maps, a picture with a pixel per cell) that is stretched over its place; axes are written
around it in HTML, so that they stay legible at any width. What a pointer or the arrow keys show lies beside it as JSON.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.image import imsave

from sparsecod_mcore.report.page.scales import Scale, layer_ticks, number
from sparsecod_mcore.report.style import EVEN_COLOURS

DIVERGING_COLOURS = mpl.colormaps["PuOr_r"]
DASHES = ("", "7 3", "2 3", "9 3 2 3")
_NUM_COLOURS = 8
_HALF_BAR = 0.41  # of the room for one
_MAX_POINTS_WITH_DOTS = 36

type Text = Callable[[float], str]


@dataclass(frozen=True)
class Tick:
    at: float  # from 0 at the left or bottom to 1
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the page's template makes a chart of."""

    alt: str
    plot: Markup
    hover: dict[str, Any]
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    shape: Literal["wide", "square"] = "wide"
    title: str = ""
    is_run_title: bool = False


@dataclass(frozen=True)
class Line:
    """One line or one colour of bars; `colour` and `dash` are places in the page's palettes."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str  # class of the stylesheet: run-0 …, part-0 …
    dash: int = 0
    texts: Sequence[str] = field(default=())  # what hovering says, if not the figure alone

    def said(self) -> list[str]:
        return list(self.texts) or [number(value) for value in self.y]


def run_line(index: int) -> dict[str, Any]:
    """The look of the run at a place, the same in all charts."""
    return {"colour": f"run-{index % _NUM_COLOURS}", "dash": index % len(DASHES)}


def line_chart(
    lines: Sequence[Line],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    x: Scale,
    y: Scale,
    x_text: Text,
    x_ticks: Sequence[Tick],
    y_text: Text = number,
    **more: Any,
) -> Chart:
    """Lines over one x axis, each with x of its own; `x_text` says what hovering calls an x."""
    marks = []
    with_dots = max(len(line.x) for line in lines) <= _MAX_POINTS_WITH_DOTS
    for line in lines:
        points = [(x(a), y(b)) for a, b in zip(line.x, line.y, strict=True)]
        look = Markup(' stroke-dasharray="{}"').format(DASHES[line.dash]) if DASHES[line.dash] else ""
        marks.append(Markup('<path class="stroke {}"{} d="{}"/>').format(line.colour, look, _path(points)))
        if with_dots:
            dots = "".join(
                f"M{100 * a:.2f} {100 - 100 * b:.2f}h0" for a, b in points if a is not None and b is not None
            )
            marks.append(Markup('<path class="dots {}" d="{}"/>').format(line.colour, dots))
    return Chart(
        alt=alt, plot=_svg(y, marks), hover=_hover(lines, x, y, x_text), x_label=x_label, y_label=y_label,
        x_ticks=list(x_ticks), y_ticks=_ticks(y, y_text), **more,
    )  # fmt: skip


def _hover(lines: Sequence[Line], x: Scale, y: Scale | None, x_text: Text) -> dict[str, Any]:
    """What is said at each x; dots lie on the lines where there is a `y`."""
    series = [
        {
            "name": line.name,
            "colour": line.colour,
            "x": [_rounded(x(value)) for value in line.x],
            "y": [None if y is None else _rounded(y(value)) for value in line.y],
            "at": [x_text(value) for value in line.x],
            "text": line.said(),
        }
        for line in lines
    ]
    return {"kind": "x", "series": series}


def layer_lines(lines: Sequence[Line], num_layers: int, *, y: Scale, alt: str, y_label: str, **more: Any) -> Chart:
    """Lines against depth, a point per layer."""
    x = Scale(-0.5, num_layers - 0.5)
    return line_chart(
        lines, alt=alt, x_label="layer", y_label=y_label, x=x, y=y, x_text=lambda layer: f"layer {layer:g}",
        x_ticks=_layer_axis(x, num_layers), **more,
    )  # fmt: skip


def bars(
    lines: Sequence[Line],
    num_places: int,
    *,
    alt: str,
    x_label: str,
    y_label: str,
    y: Scale,
    threshold: float | None = None,
    levels: Sequence[Line] = (),
    place: str = "layer",
    y_text: Text = number,
    **more: Any,
) -> Chart:
    """Bars at places 0, 1, …: stacked where there are several, negative figures below zero.

    Bars that do not reach the `threshold` are pale; `levels` are marked across them.
    """
    x = Scale(-0.5, num_places - 0.5)
    marks, above, below = [], np.zeros(num_places), np.zeros(num_places)
    for line in lines:
        rectangles: dict[str, list[str]] = {"": [], " pale": []}
        for at, value in enumerate(line.y):
            if not math.isfinite(value):
                continue
            stack = above if value >= 0 else below
            kind = " pale" if threshold is not None and value <= threshold else ""
            rectangles[kind].append(_rectangle(x, y, at - _HALF_BAR, 2 * _HALF_BAR, stack[at], stack[at] + value))
            stack[at] += value
        for kind, drawn in rectangles.items():
            if drawn:
                marks.append(Markup('<path class="fill {}{}" d="{}"/>').format(line.colour, kind, "".join(drawn)))
    for line in levels:
        places = [(at, y(value)) for at, value in enumerate(line.y)]
        drawn = [
            _path([(x(at - _HALF_BAR), level), (x(at + _HALF_BAR), level)]) for at, level in places if level is not None
        ]
        marks.append(Markup('<path class="level {}" d="{}"/>').format(line.colour, "".join(drawn)))
    if threshold is not None and (level := y(threshold)) is not None:
        marks.append(Markup('<path class="threshold" d="M0 {0:.2f}H100"/>').format(100 - 100 * level))
    return Chart(
        alt=alt, plot=_svg(y, marks), hover=_hover([*lines, *levels], x, None, lambda at: f"{place} {at:g}"),
        x_label=x_label, y_label=y_label, x_ticks=_layer_axis(x, num_places), y_ticks=_ticks(y, y_text), **more,
    )  # fmt: skip


def heat_map(
    values_RC: npt.NDArray[np.float64],
    *,
    colours: Scale,
    alt: str,
    x_label: str,
    y_label: str,
    row_texts: Sequence[str],
    column_texts: Sequence[str],
    x_ticks: Sequence[Tick],
    y_ticks: Sequence[Tick],
    diverging: bool = False,
    digits: int = 3,
    **more: Any,
) -> Chart:
    """A picture with a pixel per cell, row 0 at the top; NaN stays empty."""
    shade_RC = np.array([[colours(value) for value in row] for row in values_RC.tolist()], dtype=float)
    palette = DIVERGING_COLOURS if diverging else EVEN_COLOURS
    pixels_RC4 = palette(np.clip(np.nan_to_num(shade_RC), 0, 1))
    pixels_RC4[np.isnan(shade_RC), 3] = 0.0
    picture = io.BytesIO()
    imsave(picture, pixels_RC4, format="png", metadata={"Software": ""})
    encoded = base64.b64encode(picture.getvalue()).decode()
    cells = [[float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in row] for row in values_RC.tolist()]
    hover = {"kind": "cell", "rows": list(row_texts), "columns": list(column_texts), "cells": cells}
    return Chart(
        alt=alt, plot=Markup('<img alt="" src="data:image/png;base64,{}">').format(encoded), hover=hover,
        x_label=x_label, y_label=y_label, x_ticks=list(x_ticks), y_ticks=list(y_ticks), **more,
    )  # fmt: skip


@dataclass(frozen=True)
class ColourBar:
    """The legend of heat maps that share their colours."""

    label: str
    stops: str  # CSS colours from low to high
    ticks: list[Tick]


def colour_bar(scale: Scale, label: str, *, diverging: bool = False) -> ColourBar:
    palette = DIVERGING_COLOURS if diverging else EVEN_COLOURS
    stops = ", ".join(mpl.colors.to_hex(palette(share)) for share in np.linspace(0, 1, 12))
    return ColourBar(label, stops, [Tick(round(scale(tick) or 0.0, 4), number(tick)) for tick in scale.ticks(4)])


def cell_ticks(count: int, num_shown: Sequence[int], texts: Sequence[str], *, downwards: bool = False) -> list[Tick]:
    """Ticks in the middle of cells."""
    return [
        Tick(1 - (at + 0.5) / count if downwards else (at + 0.5) / count, texts[at]) for at in num_shown
    ]  # fmt: skip


def axis(x: Scale, text: Text) -> list[Tick]:
    return [Tick(round(x(tick) or 0.0, 4), text(tick)) for tick in x.ticks(4)]


def _layer_axis(x: Scale, num_layers: int) -> list[Tick]:
    return [Tick(round(x(layer) or 0.0, 4), str(layer)) for layer in layer_ticks(num_layers)]


def _ticks(y: Scale, text: Text = number) -> list[Tick]:
    return [Tick(round(y(tick) or 0.0, 4), text(tick)) for tick in y.ticks()]


def _rectangle(x: Scale, y: Scale, left: float, width: float, start: float, end: float) -> str:
    a, b = (100 * (x(edge) or 0.0) for edge in (left, left + width))
    c, d = (100 - 100 * min(1.0, max(0.0, y(edge) or 0.0)) for edge in (start, end))
    return f"M{a:.2f} {c:.2f}H{b:.2f}V{d:.2f}H{a:.2f}z"


def _path(points: Sequence[tuple[float | None, float | None]]) -> str:
    """Straight lines through the points, broken where one has no place."""
    steps, pen_up = [], True
    for a, b in points:
        if a is None or b is None:
            pen_up = True
            continue
        steps.append(f"{'M' if pen_up else 'L'}{100 * a:.2f} {100 - 100 * b:.2f}")
        pen_up = False
    return "".join(steps)


def _svg(y: Scale, marks: Sequence[Markup]) -> Markup:
    grid = "".join(f"M0 {100 - 100 * tick.at:.2f}H100" for tick in _ticks(y))
    start = Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"><path class="grid" d="{}"/>'
    )
    return start.format(grid) + Markup("").join(marks) + Markup("</svg>")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
