"""A family of runs as a YAML file: configurations times a grid times seeds, and where everything goes."""

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sparsecod_mcore.config import ConfigLoader, read_config
from sparsecod_mcore.errors import UserError, nearest

LEARNING_RATE = "lr"
SEED = "seed"


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What `tools/score_layers.py` is asked for, once a model is trained; `length` by default that of training."""

    scores: str = "causal,permutation,usefulness,effective_depth,weight_sparsity,attention"
    sequences: int = 16
    length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What one run of an array asks for; `options` are further lines of #SBATCH, by name."""

    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    at_once: int | None = None
    setup: str = ""  # shell commands before the run
    options: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A family of runs, each in a folder of `out` under its name."""

    out: Path
    data: Path
    tokenizer: Path
    configs: Sequence[Path]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # values by key of a configuration
    seeds: Sequence[int] = ()  # none: that of the configuration
    set: Mapping[str, Any] = field(default_factory=dict)  # keys of a configuration, for all runs
    processes: int = 1  # of a run that is not Slurm's
    at_once: int = 1  # such runs
    score: Scoring | None = field(default_factory=Scoring)
    slurm: Slurm = field(default_factory=Slurm)


@dataclass(frozen=True)
class Task:
    """One run of a sweep: its name, its whole configuration by key, and what tells it from others."""

    name: str
    config: str  # name of the configuration that it is made from
    settings: Mapping[str, Any]
    varied: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(dict(self.settings), sort_keys=True).encode()).hexdigest()


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file; relative paths in it are relative to the working directory.

    Raises `UserError` if it is no sweep: for unknown keys with the nearest, for patterns that match no file.
    """
    try:
        content = yaml.load(path.read_text(), Loader=ConfigLoader)
    except OSError as error:
        raise UserError(f"cannot read the sweep {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    content = _mapping(path, "the file", content)
    needed = {"out", "data", "tokenizer", "configs"}
    if missing := sorted(needed - content.keys()):
        raise UserError(f"{path} lacks {', '.join(missing)}")
    content |= {name: Path(content[name]) for name in ("out", "data", "tokenizer")}
    content["configs"] = _matching(path, content["configs"])
    content["set"] = _flat(_mapping(path, "set", content.get("set", {})))
    content["grid"] = {
        key: value if isinstance(value, list) and value else _refuse(path, f"grid: {key} must be a list of values")
        for key, value in _flat(_mapping(path, "grid", content.get("grid", {}))).items()
    }
    if content.get("score", True) in (False, None):
        content["score"] = None
    else:
        content["score"] = _made(path, "score", Scoring, _mapping(path, "score", content.get("score", {})))
    content["slurm"] = _made(path, "slurm", Slurm, _mapping(path, "slurm", content.get("slurm", {})))
    sweep: Sweep = _made(path, "the file", Sweep, content)
    for name in ("processes", "at_once"):
        if not isinstance(getattr(sweep, name), int) or getattr(sweep, name) < 1:
            _refuse(path, f"{name} must be 1 or more")
    return sweep


def _refuse(path: Path, reason: str) -> Any:
    raise UserError(f"{path}: {reason}")


def _mapping(path: Path, what: str, content: Any) -> dict[str, Any]:
    return dict(content) if isinstance(content, dict) else _refuse(path, f"{what} must be a mapping of keys to values")


def _made(path: Path, what: str, kind: type, content: Mapping[str, Any]) -> Any:
    accepted = [entry.name for entry in fields(kind)]
    for key in content:
        if key not in accepted:
            _refuse(path, f"{key!r} is no key of {what}{nearest(str(key), accepted)}")
    return kind(**content)


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """A ``cod:`` block as keys prefixed with ``cod.``, as `config.read_config` has them."""
    own = content.pop("cod", {})
    return content | {f"cod.{key}": value for key, value in own.items()}


def _matching(path: Path, patterns: Any) -> list[Path]:
    """The files of one pattern or of several; those of one pattern by name, as a person would sort them."""
    found: list[Path] = []
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        matches = sorted(glob.glob(str(pattern)), key=_by_number)
        if not matches:
            _refuse(path, f"configs: no file matches {pattern}")
        found += map(Path, matches)
    return found


def _by_number(path: str) -> list[tuple[float, str]]:
    """A key that sorts numbers in names by value, each after the text before it: depth_4 before depth_16."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", path.removesuffix(".yaml"))
    return [(float(piece), "") if index % 2 else (-1.0, piece) for index, piece in enumerate(pieces)]


def tasks_of(sweep: Sweep) -> list[Task]:
    """Every run of a sweep: configurations × grid × seeds, in this order.

    Raises `UserError` for configurations of one name. Runs that come out equal, as a grid may make them, are one.
    """
    names = [path.stem for path in sweep.configs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two configurations of the sweep are called {twice[0]}")
    tasks: dict[str, Task] = {}
    for path in sweep.configs:
        for task in varied_tasks(path.stem, read_config(path) | dict(sweep.set), sweep.grid, sweep.seeds):
            tasks.setdefault(task.fingerprint, task)
    return list(tasks.values())


def varied_tasks(
    config: str, base: Mapping[str, Any], grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> Iterator[Task]:
    """The configuration `base` at every point of `grid`, with every seed."""
    for values in itertools.product(*grid.values()):
        for seed in [{SEED: seed} for seed in seeds] or [{}]:
            varied = dict(zip(grid, values, strict=True)) | seed
            words = (f"{key.removeprefix('cod.')}={value}" for key, value in varied.items())
            yield Task("-".join([config, *words]), config, {**base, **varied}, varied)
