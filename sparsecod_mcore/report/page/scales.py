"""Axes of charts: where a value lies between 0 and 1, which ticks are shown, and how figures are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

_MAX_TICKS = 5
_LARGEST = 1e30


@dataclass(frozen=True)
class Scale:
    """Maps figures from `low` to `high` to 0 … 1, evenly or by their logarithm."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, logarithmic: bool = False, include: Iterable[float] = ()) -> Self:
        """A scale with room for all finite `values` (positive ones, if logarithmic) and those of `include`."""
        found = np.array([*values, *include], dtype=float)
        # What is not finite, or beside which nothing else could be told apart, lies outside.
        found = found[(np.abs(found) < _LARGEST) & ((found > 1 / _LARGEST) | (not logarithmic))]
        low, high = (float(found.min()), float(found.max())) if found.size else (1.0, 10.0)
        if logarithmic:
            return cls(low / 1.05, high * 1.05, True) if high > low else cls(low / 2, high * 2, True)
        room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        bounds = set(include)
        return cls(low if low in bounds else low - room, high if high in bounds and high > low else high + room)

    def __call__(self, value: float) -> float | None:
        """Where `value` lies; None for one that has no place."""
        if not math.isfinite(value) or (self.logarithmic and value <= 0):
            return None
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = _MAX_TICKS) -> list[float]:
        """A few round figures inside the scale."""
        if not self.logarithmic:
            ticks = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        else:
            decades = math.log10(self.high / self.low)
            subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.4 else (1.0, 2.0, 5.0)
            ticks = LogLocator(subs=subs, numticks=count + 4).tick_values(self.low, self.high)
            inside = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(inside) < 2:
                ticks = MaxNLocator(nbins=count, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        inside = [float(tick) for tick in ticks if self.low <= tick <= self.high]
        step = max(1, -(-len(inside) // (count + 1)))
        return inside[::step]


def layer_ticks(num_layers: int, most: int = 8) -> list[int]:
    """Layers, from the first, at an even step."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 10**9) if num_layers / step <= most)
    return list(range(0, num_layers, step))


def number(value: float | None) -> str:
    """About three significant digits: 0.0123, 1.23, 12.3, 1,230, 1.2e7; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share in percent with a true minus sign."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(100 * value)
    text = f"{100 * value:,.0f}" if size >= 9.95 else f"{100 * value:.2g}"
    return f"{text} %".replace("-", "−")


def tokens(count: float | None) -> str:
    """A count of tokens or parameters as one says it: 500, 40k, 1.2M, 100B."""
    if count is None:
        return "–"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"


def duration(seconds: float | None) -> str:
    """Seconds as 45 s, 12 min, 3.4 h or 2.1 days."""
    if seconds is None:
        return "–"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h"), (math.inf, 86400, "days")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return "–"
