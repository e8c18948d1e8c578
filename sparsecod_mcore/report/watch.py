"""A run in the terminal while it trains: curves, variance by layer, time left, all from the files that it leaves."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import plotext
import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.monitor.parquet import read_statistics
from sparsecod_mcore.report.log_file import Log, read_log
from sparsecod_mcore.report.page.scales import duration, number, tokens

_CURVE_HEIGHT = 9
_MAX_POINTS = 200
_MAX_LAYERS = 16
_SILENT_AFTER = 5.0  # times the usual time between log lines


@dataclass
class Watched:
    """A run's directory, read again only where files have changed."""

    path: Path
    _parts: tuple[str, ...] = ()
    _profile: "Profile | None" = None
    _config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any((self.path / name).exists() for name in ("config.yaml", "log.jsonl", "stats")):
            raise UserError(f"{self.path} holds no run (config.yaml, log.jsonl, stats/)")

    def log(self) -> Log:
        return read_log(self.path / "log.jsonl")

    def target(self) -> int | None:
        """The number of steps the run is to take."""
        if not self._config and (self.path / "config.yaml").exists():
            try:
                self._config = yaml.safe_load((self.path / "config.yaml").read_text()) or {}
            except yaml.YAMLError:
                return None  # being written
        found = self._config.get("train_iters")
        return found if isinstance(found, int) else None

    def profile(self) -> "Profile | None":
        """Variance by layer as last stored; statistics reach the disk with each checkpoint, or every ten minutes."""
        parts = tuple(sorted(part.name for part in (self.path / "stats").glob("part-*.parquet")))
        if parts and parts != self._parts:
            try:
                found = read_statistics(self.path / "stats", stream="layer_output", statistic="variance")
                series = found.series("layer_output", "variance")
            except UserError:
                return self._profile
            self._profile = Profile(int(series.iterations_I[-1]), series.values_IL[-1])
            self._parts = parts
        return self._profile


@dataclass(frozen=True)
class Profile:
    """Variance of each layer's output at one step."""

    iteration: int
    variance_L: np.ndarray


def watch(path: Path, *, seconds: float, once: bool) -> None:
    """Show the run until interrupted, or once where that is asked for or the output is no terminal."""
    watched, console = Watched(path), Console()
    if once or not console.is_terminal:
        console.print(screen(watched, console.width))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(screen(watched, console.width), refresh=True)
                time.sleep(seconds)
        except KeyboardInterrupt:
            pass


def screen(watched: Watched, width: int, now: Callable[[], float] = time.time) -> RenderableType:
    """One frame, `width` columns wide."""
    log, target = watched.log(), watched.target()
    if not log.steps:
        return Text(f"{watched.path}: nothing is logged yet")
    parts: list[RenderableType] = [_header(watched, log, target, now())]
    half = width // 2 if width >= 100 else width
    curves = [_curve(log, "loss", "loss", half), _curve(log, "last_layer_variance", "variance of h_L", half)]
    if half < width:
        beside = Table.grid(expand=True)
        beside.add_row(*curves)
        parts.append(beside)
    else:
        parts += curves
    if (profile := watched.profile()) is not None:
        parts += _bars(profile, width)
    else:
        parts.append(Text("no statistics are stored yet"))
    return Group(*parts)


def _header(watched: Watched, log: Log, target: int | None, now: float) -> RenderableType:
    last = log.steps[-1]
    speeds = [step for step in log.steps if "seconds_per_step" in step]
    done = last["iteration"]
    said = [f"step {done:,}" + (f" of {target:,}" if target else "")]
    if speeds:
        pace = speeds[-1]["seconds_per_step"]
        quiet = now - (watched.path / "log.jsonl").stat().st_mtime
        between = pace * (speeds[-1]["iteration"] - (speeds[-2]["iteration"] if len(speeds) > 1 else 0))
        is_done = target is not None and done >= target
        is_silent = not is_done and quiet > max(60.0, _SILENT_AFTER * between)
        if is_done:
            said.append("done")
        elif is_silent:  # stopped, or stuck: nobody knows when it ends
            said.append(f"silent for {duration(quiet)}")
        elif target:
            said.append(f"{duration((target - done) * pace)} left")
        if not is_silent:
            said.append(f"{speeds[-1]['tokens_per_second']:,.0f} tokens/s")
    said.append(f"loss {number(last.get('loss') and float(last['loss']))}")
    said.append(f"variance of h_L {number(_latest(log, 'last_layer_variance'))}")
    if (perplexity := log.perplexity()) is not None:
        said.append(f"validation perplexity {number(perplexity)}")
    lines: list[RenderableType] = [Text(str(watched.path), style="bold"), Text(" · ".join(said))]
    if target:
        lines.append(ProgressBar(total=target, completed=done))
    return Group(*lines)


def _latest(log: Log, key: str) -> float | None:
    values = log.curve(key)[1]
    return values[-1] if values else None


def _curve(log: Log, key: str, title: str, width: int) -> RenderableType:
    """A curve over tokens, of a point per few steps."""
    at, values = log.curve(key)
    finite = [(x, y) for x, y in zip(at, values, strict=True) if math.isfinite(y)]
    if len(finite) < 2:
        return Text(f"{title}: not yet known")
    some = np.unique(np.linspace(0, len(finite) - 1, min(len(finite), _MAX_POINTS)).round().astype(int))
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width - 1, _CURVE_HEIGHT)
    plotext.plot([finite[i][0] for i in some], [finite[i][1] for i in some], marker="braille")
    for set_ticks, written, of in ((plotext.xticks, tokens, 0), (plotext.yticks, number, 1)):
        ticks = np.linspace(min(point[of] for point in finite), max(point[of] for point in finite), 3).tolist()
        set_ticks(ticks, [written(tick) for tick in ticks])
    plotext.title(title)
    return Text.from_ansi(plotext.build())


def _bars(profile: Profile, width: int) -> Sequence[RenderableType]:
    """Variance by layer as bars, evenly chosen layers where there are many."""
    variance_L = profile.variance_L
    num_layers = len(variance_L)
    shown = np.unique(np.linspace(0, num_layers - 1, min(num_layers, _MAX_LAYERS)).round().astype(int))
    largest = max((value for value in variance_L.tolist() if math.isfinite(value)), default=1.0) or 1.0
    room = max(10, width - 24)
    lines: list[RenderableType] = [Text(f"variance by layer at step {profile.iteration:,}", style="bold")]
    for layer in shown.tolist():
        value = float(variance_L[layer])
        share = value / largest if math.isfinite(value) else 0.0
        lines.append(Text(f"layer {layer:>3} {number(value):>9} {'█' * max(0, round(share * room))}"))
    return lines
