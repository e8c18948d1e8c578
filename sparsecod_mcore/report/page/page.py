"""One self-contained HTML page of runs side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.report.diagnosis import diagnose
from sparsecod_mcore.report.gather import Run, gather
from sparsecod_mcore.report.page import score_figures, training_figures
from sparsecod_mcore.report.page.charts import run_line
from sparsecod_mcore.report.page.evaluation import evaluation_rows
from sparsecod_mcore.report.page.figure import Figure, least_width
from sparsecod_mcore.report.page.scales import duration, number, tokens
from sparsecod_mcore.report.published import counterpart

# In the order of the page: the result first, then its causes.
FIGURES: tuple[Callable[[training_figures.Numbered], Figure], ...] = (
    score_figures.usefulness,
    training_figures.over_training,
    training_figures.variance_maps,
    training_figures.variance_by_depth,
    training_figures.kurtosis_by_depth,
    score_figures.jacobian_by_depth,
    training_figures.growth_parts,
    training_figures.jacobian_maps,
    score_figures.jacobian_matrices,
    score_figures.causal,
    score_figures.permutation,
    score_figures.sparsity,
    score_figures.experts,
)
# Settings that say where a run lies or how it is watched, not what it is.
_NOT_THE_RECIPE = frozenset(("cod", "save_interval", "eval_interval", "eval_iters", "log_interval", "num_workers"))


_FLAGS = {"unfinished": "training is unfinished", "damaged": "files are damaged"}


@dataclass(frozen=True)
class Card:
    """The headline of one run."""

    name: str
    colour: str
    big: str
    says: str
    flags: list[str]  # what makes its figures doubtful
    facts: list[tuple[str, str]]


def write_report(paths: Sequence[Path], out: Path) -> list[Run]:
    """Write the report of the runs and scores at `paths` to the file `out`, and return what was found.

    Raises `UserError` for a path that holds neither, and where `out` cannot be written.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; a file is wanted, such as {out / 'report.html'}")
    runs = gather(paths)
    make_folder(out.absolute().parent)
    write_atomically(out, render(runs).encode())
    return runs


def render(runs: Sequence[Run]) -> str:
    """The page: the same runs give the same bytes."""
    numbered = list(enumerate(runs))
    figures = [figure(numbered) for figure in FIGURES]
    return _template().render(
        title=_title(runs),
        cards=[_card(index, run) for index, run in numbered],
        differing=_differing(runs),
        advice=diagnose(runs),
        notes=[(run.name, run.notes) for run in runs if run.notes],
        figures=[figure for figure in figures if figure.charts],
        unmeasured=[figure for figure in figures if not figure.charts],
        evaluation=evaluation_rows(runs),
        repeats=any(map(counterpart, runs)),
        least=least_width(len(runs)),
        runs=runs,
    )


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("sparsecod_mcore.report.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("sparsecod_mcore.report.page")
    environment.globals["style"] = Markup((folder / "style.css").read_text())
    environment.globals["script"] = Markup((folder / "hover.js").read_text())
    return environment.get_template("template.html")


def _title(runs: Sequence[Run]) -> str:
    return "Which layers work: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")


def _card(index: int, run: Run) -> Card:
    scores, log = run.scores, run.log
    depth = None if scores is None else scores.effective_depth
    perplexity = log.perplexity()
    if perplexity is None and scores is not None and scores.loss is not None:
        perplexity = math.exp(min(scores.loss, 700.0))
    facts = {
        "last-layer variance": number(run.last_layer_variance),
        "perplexity": number(perplexity),
        "usefulness": number(None if scores is None or scores.usefulness is None else scores.usefulness.scored.score),
        "causal score": number(None if scores is None or scores.causal is None else scores.causal.score),
        "permutation score": number(None if scores is None or scores.permutation is None else scores.permutation.score),
        "parameters": tokens(
            None if scores is None or scores.weight_sparsity is None else scores.weight_sparsity.parameters
        ),
        "trained on": "–" if run.tokens is None else f"{tokens(run.tokens)} tokens",
        "time": duration(log.seconds()),
        "FLOPs per device": number(log.flops()),
    }
    return Card(
        name=run.name,
        colour=str(run_line(index)["colour"]),
        big="?" if depth is None else f"{depth.effective}",
        says=(f"of {run.num_layers} layers" if run.num_layers else "layers")
        + (": not scored" if depth is None else f" work, {depth.wasted} {'is' if depth.wasted == 1 else 'are'} wasted"),
        flags=[_FLAGS[kind] for kind in _FLAGS if any(note.kind == kind for note in run.notes)],
        facts=list(facts.items()),
    )


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which runs differ, and each run's."""
    configured = [run.config for run in runs]
    if len(runs) < 2:
        return []
    names = sorted({name for config in configured for name in config} - _NOT_THE_RECIPE)
    rows = [(name, ["–" if config.get(name) is None else str(config[name]) for config in configured]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
