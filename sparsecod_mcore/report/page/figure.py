"""What a figure of the report consists of, and its data as CSV."""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sparsecod_mcore.report.gather import Run
from sparsecod_mcore.report.page.charts import DASHES, Chart, ColourBar, run_line

# By the number of charts side by side: the least width of one, in pixels.
_LEAST_WIDTHS = {1: 280, 2: 400, 3: 330, 4: 260, 5: 210}
_LEAST_WIDTH = 260


def least_width(count: int) -> int:
    """The least width, in pixels, that lets `count` things stand side by side on a wide screen."""
    return _LEAST_WIDTHS.get(count, _LEAST_WIDTH)


@dataclass(frozen=True)
class LegendItem:
    name: str
    colour: str
    dash: int = 0
    shape: Literal["line", "bar", "level"] = "line"

    @property
    def dashes(self) -> str:
        return DASHES[self.dash]


@dataclass(kw_only=True)
class Figure:
    """A figure of the page: a sentence that says what to see, charts beside each other, and the data."""

    key: str
    title: str
    see: str
    charts: list[Chart] = field(default_factory=list)
    legend: list[LegendItem] = field(default_factory=list)
    colour_bar: ColourBar | None = None
    columns: Sequence[str] = ()
    rows: list[Sequence[object]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # runs that have no such data
    remedy: str = ""  # what would bring the data
    note: str = ""

    @property
    def least_width(self) -> int:
        return least_width(len(self.charts))

    @property
    def csv(self) -> str:
        """The data as a link."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in self.rows)
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.getvalue().encode()).decode()


def run_legend(runs: Iterable[tuple[int, Run]]) -> list[LegendItem]:
    return [LegendItem(run.name, **run_line(index)) for index, run in runs]
