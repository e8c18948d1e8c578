"""Everything that is known of a run or a model, from whichever of its files are there and whole."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from sparsecod_mcore.data.json_file import read_json
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.monitor.parquet import Series, read_statistics
from sparsecod_mcore.report.log_file import Log, read_log
from sparsecod_mcore.scoring.results import Scores, read_scores

_STATISTICS = (
    "variance",
    "shortcut_variance",
    "covariance",
    "dimension_kurtosis",
    "deviation",
    "deviation_error",
)
_SCORE_FILES = ("scores.json", "sparsity.json")
_EVALUATION_FILE = "evaluation.json"
# Where a run's scores and evaluation may lie, relative to its directory.
_FOLDERS = (".", "scores", "sparsity", "evaluation")
_LAST_SHARE = 0.1  # of the measured steps, over which figures "at the end" are averaged

type Key = tuple[str, str]  # stream, statistic


class Note(NamedTuple):
    """What a report lacks of a run, and why."""

    kind: Literal["damaged", "unfinished", "missing"]
    text: str


@dataclass
class Run:
    """One run, or one model that was scored. What is not there is empty or None, and said in `notes`."""

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)  # flat, as config.yaml has it
    log: Log = field(default_factory=Log)
    series: dict[Key, Series] = field(default_factory=dict)
    scores: Scores | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    is_run: bool = True

    @property
    def num_layers(self) -> int | None:
        if self.scores is not None:
            return self.scores.layers
        layers = self.config.get("num_layers")
        if isinstance(layers, int):
            return layers
        return next((series.values_IL.shape[1] for series in self.series.values()), None)

    @property
    def tokens(self) -> int | None:
        """Training tokens seen so far."""
        return self.log.steps[-1]["tokens"] if self.log.steps else None

    def at_end(self, stream: str, statistic: str) -> np.ndarray | None:
        """By layer, the mean over the last tenth of the measured steps [L]; None where not recorded."""
        window_IL = self.window(stream, statistic)
        return None if window_IL is None else window_IL.mean(axis=0)

    def window(self, stream: str, statistic: str) -> np.ndarray | None:
        """The last tenth of the measured steps [I, L]."""
        series = self.series.get((stream, statistic))
        if series is None:
            return None
        return series.values_IL[-max(1, round(len(series.values_IL) * _LAST_SHARE)) :]

    @property
    def last_layer_variance(self) -> float | None:
        """Var(h_L) (Eq. 4) at the end of training."""
        variance_L = self.at_end("layer_output", "variance")
        if variance_L is not None:
            return float(variance_L[-1])
        if self.scores is not None and self.scores.moments is not None:
            return self.scores.moments.streams["layer_output"]["variance"][-1]
        return None


def gather(paths: Sequence[Path]) -> list[Run]:
    """The runs at `paths`, each a run's directory, or a folder of scores; scores join the run that they are of.

    Raises `UserError` for a path where neither is.
    """
    runs = [_read(path) for path in dict.fromkeys(path.resolve() for path in map(_folder_of, paths))]
    joined = _join_scores(runs)
    for run, name in zip(joined, _names([run.path for run in joined]), strict=True):
        run.name = name
        run.notes += missing(run)
    return joined


def _folder_of(path: Path) -> Path:
    """A file of scores or of an evaluation stands for its folder."""
    return path.parent if path.name in (*_SCORE_FILES, _EVALUATION_FILE) and path.is_file() else path


def _read(path: Path) -> Run:
    if not path.is_dir():
        raise UserError(f"{path} is no folder; a run's directory or a folder of scores is accepted")
    is_run = any((path / name).exists() for name in ("config.yaml", "log.jsonl", "stats"))
    run = Run(name=path.name, path=path, is_run=is_run)
    folders = [path / name for name in _FOLDERS]
    found = [folder / name for folder in folders for name in (*_SCORE_FILES, _EVALUATION_FILE)]
    if not is_run and not any(file.exists() for file in found):
        raise UserError(f"{path} holds neither a run (config.yaml, log.jsonl, stats/) nor scores (scores.json)")
    if is_run:
        _read_training(run)
    for folder in folders:
        for name in _SCORE_FILES:
            _merge(run, _attempt(run, read_scores, folder / name))
        if not run.evaluation:
            run.evaluation = _attempt(run, read_json, folder / _EVALUATION_FILE) or {}
    return run


def _attempt[T](run: Run, read: Callable[[Path], T], file: Path) -> T | None:
    """What `read` makes of a file; None where it is not there, or is damaged, which is noted."""
    if not file.exists():
        return None
    try:
        return read(file)
    except UserError as error:
        run.notes.append(Note("damaged", f"{_within(run, str(error))}; it is left out."))
        return None


def _within(run: Run, text: str) -> str:
    """`text` with places inside the run's folder named relative to it."""
    return text.replace(f"{run.path}/", "")


def _read_training(run: Run) -> None:
    run.config = _attempt(run, _read_config, run.path / "config.yaml") or {}
    run.log = read_log(run.path / "log.jsonl")
    if run.log.damaged_lines:
        lines = "line" if run.log.damaged_lines == 1 else "lines"
        run.notes.append(
            Note("damaged", f"{run.log.damaged_lines} {lines} of log.jsonl cannot be read and were skipped.")
        )
    _read_series(run)


def _read_config(file: Path) -> dict[str, Any]:
    """As `sparsecod_mcore.config` reads it, without Megatron's parser."""
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{file} is damaged: it is no YAML") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no mapping of flags")
    return content


def _read_series(run: Run) -> None:
    directory = run.path / "stats"
    parts = len(list(directory.glob("part-*.parquet")))
    if not parts:
        return
    try:
        with warnings.catch_warnings(record=True):
            statistics = read_statistics(directory, statistic=_STATISTICS)
    except UserError as error:
        run.notes.append(Note("damaged", f"{_within(run, str(error))}; none of {parts} parts was read."))
        return
    if skipped := statistics.skipped_parts:
        names = ", ".join(part.name for part in skipped)
        run.notes.append(
            Note("damaged", f"{len(skipped)} of {parts} parts of stats/ cannot be read and were skipped: {names}.")
        )
    keys = statistics.rows.group_by(["stream", "statistic"]).aggregate([]).to_pylist()
    run.series = {(key["stream"], key["statistic"]): statistics.series(**key) for key in keys}


def _merge(run: Run, scores: Scores | None) -> None:
    """Sections that the run has no scores of yet are taken from `scores`."""
    if scores is None:
        return
    if run.scores is None:
        run.scores = scores
    elif run.scores.layers != scores.layers:
        run.notes.append(
            Note(
                "damaged",
                f"a file of scores is of {scores.layers} layers, another of {run.scores.layers}; it is left out.",
            )
        )
    else:
        empty = {
            name.name: getattr(scores, name.name)
            for name in dataclasses.fields(Scores)
            if getattr(run.scores, name.name) is None
        }
        run.scores = dataclasses.replace(run.scores, **empty)


def _join_scores(found: Iterable[Run]) -> list[Run]:
    """Scores given by themselves go to the run among `found` whose model they name."""
    found = list(found)
    by_model = {run.path: run for run in found if run.is_run}
    for scored in found:
        model = None if scored.scores is None else Path(scored.scores.provenance.model)
        places = () if model is None else (model.resolve(), *model.resolve().parents)
        owner = next((by_model[place] for place in places if place in by_model), None)
        if scored.is_run or owner is None:
            continue
        _merge(owner, scored.scores)
        owner.evaluation = owner.evaluation or scored.evaluation
        owner.notes += scored.notes
        scored.scores, scored.evaluation = None, {}
    return [run for run in found if run.is_run or run.scores is not None or run.evaluation or run.notes]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart; a folder called scores goes by its parent's name."""
    plain = [path.parent if path.name in _FOLDERS else path for path in paths]
    for depth in range(1, max(len(path.parts) for path in plain) + 1):
        names = ["/".join(path.parts[-depth:]) for path in plain]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def missing(run: Run) -> list[Note]:
    """What a whole run would have and this one has not, each with what would bring it."""
    notes = []
    if run.is_run:
        notes += _missing_of_training(run)
    else:
        notes.append(Note("missing", "Only scores are given: figures of training need the run's directory."))
    if run.scores is None:
        notes.append(
            Note(
                "missing",
                "Not scored: which layers work is not known (tools/score_layers.py --model … --data … --out …).",
            )
        )
    else:
        wanted = {
            "causal": "causal",
            "permutation": "permutation",
            "usefulness": "usefulness",
            "skip": "skip",
            "jacobian": "jacobian",
        }
        absent = [name for name in wanted if getattr(run.scores, name) is None]
        if absent:
            notes.append(
                Note(
                    "missing",
                    f"Not among the scores: {', '.join(absent)} (tools/score_layers.py --scores {','.join(absent)}).",
                )
            )
        if run.scores.weight_sparsity is None or run.scores.attention is None:
            notes.append(
                Note("missing", "Sparsity of weights or attention was not measured (tools/measure_sparsity.py).")
            )
    if not run.evaluation:
        notes.append(Note("missing", "Not evaluated on tasks: there is no evaluation.json."))
    return notes


def _missing_of_training(run: Run) -> list[Note]:
    notes = []
    target, steps = run.config.get("train_iters"), run.log.steps
    if not run.config:
        notes.append(Note("missing", "No configuration (config.yaml): the recipe is not known."))
    if not steps:
        notes.append(Note("missing", "Nothing is logged (log.jsonl): loss and cost are not known."))
    elif isinstance(target, int) and steps[-1]["iteration"] < target:
        reached = steps[-1]["iteration"]
        notes.append(
            Note("unfinished", f"Training stands at step {reached:,} of {target:,}: figures are of an unfinished run.")
        )
    if not run.log.validations:
        notes.append(Note("missing", "Never validated: perplexity is not known."))
    if not run.series:
        notes.append(Note("missing", "No statistics of training (stats/): variance and kurtosis are not known."))
    else:
        if ("layer_output", "dimension_kurtosis") not in run.series:
            notes.append(Note("missing", "Kurtosis of dimensions was not measured (cod.kurtosis_interval)."))
        if ("jacobian", "deviation") not in run.series:
            notes.append(Note("missing", "Jacobians were not probed during training (cod.jacobian_interval)."))
    return notes
