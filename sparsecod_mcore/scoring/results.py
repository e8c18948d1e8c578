"""What scoring finds out about a model, and the files it is kept in: scores.json and scores.csv.

Formulas are those of the paper; their numbers stand beside the fields. Layers are counted from 0. Matrices of pairs
hold the pair (i, j), i < j, at [i][j] and 0 elsewhere; pairs that were not measured are NaN.
"""
# ruff: noqa: RUF009  axes and fraction declare fields

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.data.json_file import read_json
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring.schema import Malformed, axes, check, decode, encode, entries, fraction

SCHEMA_VERSION = 1
SPARSITY_THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)  # ε of Eq. 14 to 16
USEFUL_INCREASE = 0.1  # a layer counts as effective if its linear substitute raises the loss by more (Eq. 10)
CURVE_THRESHOLDS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

type Values = list[float]
type Matrix = list[list[float]]
type Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the figures depend on: the same provenance gives the same figures."""

    model: str  # as it was given
    model_sha256: str
    data: str | None = None
    data_sha256: str | None = None  # of the tokens that were scored
    tokens: int | None = axes(low=1, default=None)  # inputs that were scored
    dtype: Dtype
    device: str
    seed: int | None = None  # None where nothing was drawn at random
    options: dict[str, str]  # choices that change figures, such as {"compat": "reference"}
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of a score that was estimated from a sample of pairs."""

    low: float
    high: float
    confidence: float = fraction()
    pairs: int = axes(low=0)  # measured


@dataclass(frozen=True, kw_only=True)
class Causal:
    """Relative change of what layer l adds when layer s is skipped, at [s][l] (Eq. 5), and its mean (Eq. 6)."""

    matrix: Matrix = axes("layer", "other_layer", low=0.0)
    score: float = axes(low=0.0)


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Relative change of the loss when layers i and j are swapped, at [i][j] (Eq. 7), and its mean (Eq. 8)."""

    matrix: Matrix = axes("layer", "other_layer", low=0.0)
    score: float = axes(low=0.0)
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Relative increase of the loss when a linear map stands in for each layer (Eq. 9), and what follows from it."""

    relative_loss_increase: Values = axes("layer")
    score: float = fraction()  # Eq. 10
    mean: float
    sorted_increases: Values = axes("rank")  # the most useful layer first
    curve: dict[str, float] = fraction("threshold")  # share of layers above each threshold

    @classmethod
    def of(cls, relative_loss_increase: Sequence[float]) -> Self:
        """Derive the rest from the increase of each layer."""

        def share_above(threshold: float) -> float:
            return sum(increase > threshold for increase in relative_loss_increase) / len(relative_loss_increase)

        return cls(
            relative_loss_increase=list(relative_loss_increase),
            score=share_above(USEFUL_INCREASE),
            mean=sum(relative_loss_increase) / len(relative_loss_increase),
            sorted_increases=sorted(relative_loss_increase, reverse=True),
            curve={str(threshold): share_above(threshold) for threshold in CURVE_THRESHOLDS},
        )


@dataclass(frozen=True, kw_only=True)
class Usefulness:
    """Linear substitutes, fitted on the sequences that are scored (the paper's way) and on others."""

    scored: Fit
    held_out: Fit | None = None


@dataclass(frozen=True, kw_only=True)
class EffectiveDepth:
    """How many layers do work that no linear map does, E, and how many do not, W = L - E."""

    effective: int = axes(low=0)
    wasted: int = axes(low=0)
    threshold: float = axes(default=USEFUL_INCREASE)
    held_out_effective: int | None = axes(low=0, default=None)
    held_out_wasted: int | None = axes(low=0, default=None)


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The loss with each layer removed, and its relative increase."""

    loss: Values = axes("layer")
    relative_loss_increase: Values = axes("layer")


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Cosine between the token means of two layers' outputs; symmetric, with 1 on the diagonal."""

    matrix: Matrix = axes("layer", "other_layer", low=-1.0 - 1e-6, high=1.0 + 1e-6)


@dataclass(frozen=True, kw_only=True)
class LayerJacobian:
    """Of the token-averaged Jacobian J̄ of one layer, d wide. None where probes cannot tell."""

    deviation: float = axes(low=0.0)  # ‖J̄ − I‖_F / d
    deviation_error: float | None = axes(low=0.0, default=None)  # standard error over probes
    off_diagonal: float | None = axes(low=0.0, default=None)  # norm of what is off the diagonal / √(d² − d)
    diagonal_mean: float
    diagonal_mean_error: float | None = axes(low=0.0, default=None)  # standard error over probes
    diagonal_std: float | None = axes(low=0.0, default=None)
    frobenius: float | None = axes(low=0.0, default=None)
    spectral: float | None = axes(low=0.0, default=None)
    matrix: Matrix | None = axes("output", "input", in_table=False, default=None)


@dataclass(frozen=True, kw_only=True)
class Jacobian:
    """Jacobians of all layers, from the first sequences."""

    sequences: int = axes(low=1)
    method: Literal["exact", "probes"]
    probes: int | None = axes(low=1, default=None)
    layers: list[LayerJacobian] = axes("layer")


@dataclass(frozen=True, kw_only=True)
class LayerExperts:
    """How one layer's router uses its experts, and the loss when their output is zero."""

    selection_frequency: Values = fraction("expert")  # share of all choices
    balance: float = axes(high=1.0)  # 1 − std / mean of it
    loss: float
    relative_loss_increase: float


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The layers that have experts, by number."""

    layers: dict[str, LayerExperts] = axes("layer")


@dataclass(frozen=True, kw_only=True)
class TensorSparsity:
    """Of one parameter tensor; layer is None outside of the layers."""

    layer: int | None = axes(low=0, in_table=False, default=None)
    parameters: int = axes(low=0)
    sparsity: dict[str, float] = fraction("threshold")


@dataclass(frozen=True, kw_only=True)
class WeightSparsity:
    """Share of parameters with |θ| < ε (Eq. 14), each counted once however many places and ranks hold it."""

    parameters: int = axes(low=0)
    model: dict[str, float] = fraction("threshold")
    layers: dict[str, Values] = fraction("threshold", "layer")
    tensors: dict[str, TensorSparsity] = axes("tensor")


@dataclass(frozen=True, kw_only=True)
class AttentionAtLength:
    """Attention over sequences of one length, each layer's figure the mean of its heads'.

    Entropy in nats over the keys that a query sees, averaged over queries (Eq. 21-23); sparsity the share of weights
    below ε (Eq. 15, 16), among the visible entries (causal), or among all T² of which the invisible ones are 0 (full).
    Averages over layers are under names that end in _mean.
    """

    sequences: int = axes(low=1)
    entropy_mean: float
    entropy: Values = axes("layer")
    entropy_heads: Matrix = axes("layer", "head")
    sparsity_causal_mean: dict[str, float] = fraction("threshold")
    sparsity_causal: dict[str, Values] = fraction("threshold", "layer")
    sparsity_causal_heads: dict[str, Matrix] = fraction("threshold", "layer", "head")
    sparsity_full_mean: dict[str, float] = fraction("threshold")
    sparsity_full: dict[str, Values] = fraction("threshold", "layer")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention by the length of the sequences."""

    lengths: dict[str, AttentionAtLength] = axes("length")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Statistics of the residual stream, as docs/statistics.md names them; kurtosis of dimensions also of branches.

    `streams` holds {stream: {statistic: per layer}}.
    """

    sequences: int = axes(low=1)
    length: int = axes(low=1)
    embedding: dict[str, float] = axes("statistic")  # of what enters the first layer
    streams: dict[str, dict[str, Values]] = axes("stream", "statistic", "layer")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All that was measured of one model in one run; None what was not."""

    schema_version: int = axes(in_table=False, default=SCHEMA_VERSION)
    provenance: Provenance = axes(in_table=False)
    layers: int = axes(low=1)
    sequences: int | None = axes(low=1, default=None)
    length: int | None = axes(low=1, default=None)
    loss: float | None = None  # nats per token
    causal: Causal | None = None
    permutation: Permutation | None = None
    usefulness: Usefulness | None = None
    effective_depth: EffectiveDepth | None = None
    skip: Skip | None = None
    similarity: Similarity | None = None
    jacobian: Jacobian | None = None
    moe: Experts | None = None
    weight_sparsity: WeightSparsity | None = None
    attention: Attention | None = None
    moments: Moments | None = None


def write_scores(folder: Path, scores: Scores, name: str = "scores") -> None:
    """Write `name`.json and `name`.csv, each wholly or not at all. Equal scores give equal bytes.

    Raises `Malformed` for scores that do not fit together, and `UserError` if the folder cannot be written to.
    """
    _check(scores)
    make_folder(folder)
    write_atomically(folder / f"{name}.json", encode(scores))
    write_atomically(folder / f"{name}.csv", _table(scores))


def read_scores(path: Path) -> Scores:
    """Read and check a file of `write_scores`. Raises `UserError` if it is not there or something else."""
    content = read_json(path)
    found = content.get("schema_version")
    if found != SCHEMA_VERSION:
        raise UserError(f"{path} holds no scores of schema {SCHEMA_VERSION} (its schema_version: {found})")
    try:
        scores = decode(Scores, content)
        _check(scores)
    except Malformed as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return scores


def _check(scores: Scores) -> None:
    check(scores, layer=scores.layers)
    for layer in scores.moe.layers if scores.moe is not None else ():
        if not (layer.isdecimal() and int(layer) < scores.layers):
            raise Malformed(f"moe.layers has a layer {layer!r}, but the model has {scores.layers} layers")
    depth = scores.effective_depth
    if depth is not None and depth.effective + depth.wasted != scores.layers:
        raise Malformed(f"effective_depth has {depth.effective} + {depth.wasted} layers, the model {scores.layers}")


COLUMNS = ("score", "statistic", "length", "threshold", "layer", "other_layer", "item", "value")


def _table(scores: Scores) -> bytes:
    """A row per figure: the score, what of it, and where; `item` is the head, expert, tensor or stream."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in entries(scores):
        place = dict(entry.place)
        is_lower_half = "layer" in place and int(place["layer"]) >= int(place.get("other_layer", scores.layers))
        if is_lower_half and entry.path[0] != "similarity":
            continue
        known = [place.pop(axis, "") for axis in ("length", "threshold", "layer", "other_layer")]
        statistic = [*entry.path[1:], *(str(place.pop("statistic")) for _ in range("statistic" in place))]
        item = "/".join(map(str, place.values()))
        writer.writerow([entry.path[0], ".".join(statistic), *known, item, repr(entry.value)])
    return output.getvalue().encode()
