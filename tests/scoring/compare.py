"""Scores against those of another run, and against expected_scores.json.

The latter holds every score of one pretrained model, by an implementation of its own in float64.
"""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from sparsecod_mcore.scoring.results import Scores
from sparsecod_mcore.scoring.schema import Entry, entries


def assert_same_figures(found: Scores, expected: Scores, tolerance: float) -> None:
    """Whole numbers are equal; others differ by no more than `tolerance` of the largest figure of their kind.

    A kind is one statistic of one stream, tensor or threshold, in all layers, pairs and heads: a small figure among
    them is as uncertain as a large one.
    """
    largest: dict[object, float] = defaultdict(float)
    for wanted in entries(expected):
        largest[_kind(wanted)] = max(largest[_kind(wanted)], np.nan_to_num(abs(wanted.value)))
    for figure, wanted in zip(entries(found), entries(expected), strict=True):
        assert str(figure) == str(wanted)
        allowed = 0 if isinstance(wanted.value, int) else tolerance * largest[_kind(wanted)]
        assert figure.value == pytest.approx(wanted.value, rel=0, abs=allowed, nan_ok=True), str(wanted)


def _kind(figure: Entry) -> object:
    return figure.path, tuple(name for name in figure.place.values() if isinstance(name, str))


def assert_reproduced(scores: Scores, expected: dict[str, Any], *, missing: set[str] | None = None) -> None:
    """Every figure of `expected`, but for those under the names `missing`, to 1e-4 relative."""
    found = _arranged(scores)
    assert expected.keys() - found.keys() == (missing or set())
    for name, figures in found.items():
        _compare(figures, expected[name], name)


def _arranged(scores: Scores) -> dict[str, Any]:
    """The sections that `scores` has, as the file arranges them."""
    found: dict[str, Any] = {name: getattr(scores, name) for name in ("layers", "sequences", "length")}
    if scores.loss is not None:
        found["loss"] = scores.loss
    if scores.causal is not None and scores.skip is not None:
        found["causal"] = {
            "matrix": scores.causal.matrix,
            "score": scores.causal.score,
            "skip_loss": scores.skip.loss,
        }
    if scores.permutation is not None:
        found["permutation"] = {"matrix": scores.permutation.matrix, "score": scores.permutation.score}
    if scores.usefulness is not None:
        fit = scores.usefulness.scored
        found["usefulness"] = {"relative_loss_increase": fit.relative_loss_increase, "score": fit.score}
    if scores.jacobian is not None:
        names = ("deviation", "off_diagonal", "diagonal_mean", "diagonal_std", "frobenius", "spectral")
        layers = [{name: asdict(layer)[name] for name in names} for layer in scores.jacobian.layers]
        found["jacobian"] = {"sequences": scores.jacobian.sequences, "layers": layers}
    if scores.weight_sparsity is not None:
        found["weight_sparsity"] = scores.weight_sparsity.model
    if scores.attention is not None:
        attention = scores.attention.lengths[str(scores.length)]
        found["attention"] = {"entropy": attention.entropy, "sparsity_causal": attention.sparsity_causal}
    if scores.moments is not None:
        streams = scores.moments.streams
        found["variance"] = {
            "embedding": scores.moments.embedding["variance"],
            **{stream: figures["variance"] for stream, figures in streams.items()},
            "cov_residual_attention": streams["after_attention"]["covariance"],
            "cov_residual_mlp": streams["layer_output"]["covariance"],
        }
        found["kurtosis_layer_output"] = streams["layer_output"]["dimension_kurtosis"]
    return found


def _compare(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, item in expected.items():
            _compare(found[name], item, f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(expected[0], dict):
        for index, (item, wanted) in enumerate(zip(found, expected, strict=True)):
            _compare(item, wanted, f"{where}[{index}]")
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=where)
