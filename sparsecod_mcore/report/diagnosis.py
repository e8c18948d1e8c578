"""From numbers to advice: rules, each of which says what its advice rests on and how sure it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparsecod_mcore.report.gather import Run
from sparsecod_mcore.report.page.scales import number, percent
from sparsecod_mcore.report.recipe import next_ingredients
from sparsecod_mcore.report.shares import PARTS, growth_of
from sparsecod_mcore.scoring.results import USEFUL_INCREASE

SMALL_LOSS = 0.01  # relative increase of the loss up to which a layer is called droppable
_UNEVEN = 0.5  # balance of experts, below which a router is called uneven
_NEAR_IDENTITY = 0.5  # of the median layer's distance from the identity


@dataclass(frozen=True)
class Advice:
    """What to do or to know, why, and how far it can be trusted; `run` is empty where it compares runs."""

    run: str
    title: str
    text: str
    evidence: str
    uncertainty: str


def diagnose(runs: Sequence[Run]) -> list[Advice]:
    """All advice that the runs' figures allow: comparisons first, then run by run."""
    return [*_compare(runs), *(advice for run in runs for rule in RULES for advice in rule(run))]


def _compare(runs: Sequence[Run]) -> Iterator[Advice]:
    """Which of several runs has most of its layers at work."""
    known = [
        (run.scores.effective_depth.effective / run.scores.layers, run)
        for run in runs
        if run.scores is not None and run.scores.effective_depth is not None
    ]
    if len(known) < 2:
        return
    shares = [share for share, _ in known]
    best, worst = known[int(np.argmax(shares))], known[int(np.argmin(shares))]
    listed = "; ".join(f"{run.name}: {_layers(run)}" for _, run in known)
    variance = "; ".join(
        f"{run.name}: {number(run.last_layer_variance)}" for _, run in known if run.last_layer_variance is not None
    )
    layers = [run.scores.layers for _, run in known if run.scores is not None]
    one = 1 / min(layers)
    if best[0] - worst[0] < one / 2:
        title, text = "The runs use their depth alike", "None has a larger share of layers at work than another."
    else:
        title = f"{best[1].name} uses its depth best"
        text = f"{percent(best[0])} of its layers do what no linear map does, of {worst[1].name} {percent(worst[0])}."
    yield Advice(
        "",
        title,
        text,
        f"Layers at work, {listed}." + (f" Last-layer variance, {variance}." if variance else ""),
        f"One layer is {percent(one)} here; with one seed to a run, a difference of a layer or two may be chance.",
    )


def _layers(run: Run) -> str:
    assert run.scores is not None and run.scores.effective_depth is not None
    return f"{run.scores.effective_depth.effective} of {run.scores.layers}"


def _droppable(run: Run) -> Iterator[Advice]:
    """Layers that could be left out, or replaced by a linear map, and what that costs."""
    scores = run.scores
    if scores is None or scores.skip is None:
        return
    increases = dict(enumerate(scores.skip.relative_loss_increase))
    cheap = sorted(
        (layer for layer, increase in increases.items() if increase <= SMALL_LOSS), key=increases.__getitem__
    )
    order = sorted(increases, key=increases.__getitem__)
    cheapest = ", ".join(f"layer {layer}: {percent(increases[layer])}" for layer in order[:4])
    linear = "" if scores.usefulness is None else _replaceable(scores.usefulness.scored.relative_loss_increase)
    if cheap:
        title = f"Layer{'s' if len(cheap) > 1 else ''} {_listed(cheap)} could be dropped"
        without = "one of them" if len(cheap) > 1 else "it"
        text = f"Without {without} the loss rises by at most {percent(SMALL_LOSS)}.{linear}"
    else:
        title = "No layer can be dropped for free"
        text = f"The cheapest is layer {order[0]}: without it the loss rises by {percent(increases[order[0]])}.{linear}"
    yield Advice(
        run.name,
        title,
        text,
        f"Rise of the loss without the layer, cheapest first: {cheapest}.",
        f"Measured one layer at a time on {_sample(run)}: dropping several costs more than the sum wherever they stand "
        "in for each other, so drop the cheapest and score again.",
    )


def _replaceable(increases: Sequence[float]) -> str:
    layers = [layer for layer, increase in enumerate(increases) if increase <= USEFUL_INCREASE]
    if not layers:
        return " No linear map stands in for any layer."
    return f" A linear map can stand in for {_listed(layers)} at {percent(USEFUL_INCREASE)} of loss or less each."


def _sample(run: Run) -> str:
    assert run.scores is not None
    return f"{run.scores.sequences} sequences of {run.scores.length} tokens"


def _listed(layers: Sequence[int]) -> str:
    *first, last = map(str, layers)
    return f"{', '.join(first)} and {last}" if first else last


def _growth(run: Run) -> Iterator[Advice]:
    """Through what the variance grows."""
    growth = growth_of(run)
    if growth is None or growth.first <= 0:
        return
    shares = dict(zip(PARTS, growth.shares_P.tolist(), strict=True))
    attention = shares[PARTS[0]] + shares[PARTS[2]]
    aligned = shares[PARTS[2]] + shares[PARTS[3]]
    most = max(
        (
            (shares[PARTS[0]], "attention's own output"),
            (shares[PARTS[1]], "the MLPs' own output"),
            (aligned, "branches that point along the shortcut"),
        )
    )[1]
    layers_PL = growth.shares_PL.sum(axis=0)
    steepest = int(layers_PL.argmax())
    yield Advice(
        run.name,
        f"Variance grows {number(growth.last / growth.first)} times over depth, the largest part through {most}",
        f"Of the growth {percent(attention)} comes with the adds of attention and {percent(1 - attention)} with those "
        f"of the MLPs. {_meaning(aligned)} Layer {steepest} adds most, {percent(float(layers_PL[steepest]))}.",
        "Shares: "
        + "; ".join(
            f"{name} {percent(share)} ± {percent(scatter)}"
            for (name, share), scatter in zip(shares.items(), growth.scatter_P.tolist(), strict=True)
        )
        + f"; variance {number(growth.first)} at the embedding, {number(growth.last)} after the last layer.",
        "± is the scatter between the last tenth of the measured steps, each a batch of its own; it says nothing of "
        "other seeds.",
    )


def _meaning(aligned: float) -> str:
    if aligned > 0.5:
        return "Mostly branches repeat what the shortcut carries: the stream is amplified more than it is added to."
    if aligned < 0:
        return "On balance branches point against the shortcut, which damps the growth."
    return (
        f"Directions that branches add of their own make {percent(1 - aligned)} of it, those along the shortcut "
        f"{percent(aligned)}."
    )


def _identity(run: Run) -> Iterator[Advice]:
    """Layers whose Jacobian is much nearer the identity than others', and whether they are the wasted ones."""
    scores = run.scores
    if scores is None or scores.jacobian is None or scores.layers < 3:
        return
    deviation_L = np.array([layer.deviation for layer in scores.jacobian.layers])
    near = np.flatnonzero(deviation_L < _NEAR_IDENTITY * np.median(deviation_L)).tolist()
    if not near:
        return
    wasted = []
    if scores.usefulness is not None:
        wasted = [at for at in near if scores.usefulness.scored.relative_loss_increase[at] <= USEFUL_INCREASE]
    found = ", ".join(f"layer {at}: {number(float(deviation_L[at]))}" for at in near)
    agree = f" A linear map replaces {_listed(wasted)}." if wasted else ""
    several = len(near) > 1
    yield Advice(
        run.name,
        f"Layers {_listed(near)} hardly change their input" if several else f"Layer {near[0]} hardly changes its input",
        f"{'Their' if several else 'Its'} distance from the identity is less than half of the median layer's.{agree}",
        f"‖J̄ − I‖ / D: {found}; the median is {number(float(np.median(deviation_L)))}.",
        f"Averaged over {scores.jacobian.sequences} sequences; an average over tokens hides layers that act on few "
        "of them.",
    )


def _experts(run: Run) -> Iterator[Advice]:
    if run.scores is None or run.scores.moe is None:
        return
    balance = {int(layer): found.balance for layer, found in run.scores.moe.layers.items()}
    uneven = sorted(layer for layer, value in balance.items() if value < _UNEVEN)
    if not uneven:
        return
    yield Advice(
        run.name,
        f"Routers of layer{'s' if len(uneven) > 1 else ''} {_listed(uneven)} use few of their experts",
        "A larger moe_aux_loss_coeff, or a longer warm-up, spreads tokens more evenly.",
        "Balance, 1 − std / mean of the selection: "
        + ", ".join(f"layer {layer}: {number(balance[layer])}" for layer in uneven)
        + ".",
        f"Counted on {_sample(run)}, of one kind of text; experts may serve other kinds.",
    )


def _recipe(run: Run) -> Iterator[Advice]:
    """Which ingredient to try next, and what it changed in the paper."""
    if not run.config:
        return
    found = next_ingredients(run.config)
    wasted = None if run.scores is None or run.scores.effective_depth is None else run.scores.effective_depth.wasted
    need = "" if wasted is None else f" {wasted} of {run.num_layers} layers are wasted now."
    if not found:
        yield Advice(
            run.name,
            "All ingredients of the recipe are in",
            "Weight decay, training length, grouped queries and experts are all in use; what is left is to sweep them."
            + need,
            "The run's configuration, against tables 2 to 5 of the paper.",
            "The best values of the paper are of models of 1B parameters, and of a grid with few points.",
        )
        return
    first, *rest = found
    then = f" After that: {'; '.join(ingredient.step for ingredient in rest)}." if rest else ""
    yield Advice(
        run.name,
        f"Try next: {first.step}",
        f"{first.why}{then}{need}",
        f"In the paper, {first.published}.",
        "Published with one seed, at 16 layers and about 1B parameters, where usefulness moves in steps of one layer "
        "(0.06); at other sizes the best value may be another.",
    )


RULES: tuple[Callable[[Run], Iterator[Advice]], ...] = (_droppable, _growth, _identity, _experts, _recipe)
