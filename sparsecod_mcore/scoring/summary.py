"""The scores of a model in a few lines."""

from sparsecod_mcore.scoring.results import Scores


def summary(scores: Scores) -> str:
    """What a user wants to know first, a line per score."""
    lines = []
    if scores.loss is not None:
        lines.append(f"loss {scores.loss:.4f} nats per token, {scores.sequences} sequences of {scores.length}")
    if scores.causal is not None:
        lines.append(f"causal score {scores.causal.score:.4f}")
    if scores.permutation is not None:
        sampled = scores.permutation.interval
        reach = "" if sampled is None else f" [{sampled.low:.4f}, {sampled.high:.4f}], {sampled.pairs} pairs"
        lines.append(f"permutation score {scores.permutation.score:.4f}{reach}")
    if scores.usefulness is not None:
        held_out = scores.usefulness.held_out
        beside = "" if held_out is None else f"; {held_out.score:.4f} with maps fitted on other sequences"
        lines.append(f"usefulness score {scores.usefulness.scored.score:.4f}{beside}")
    if scores.skip is not None:
        increases = scores.skip.relative_loss_increase
        layer = min(range(scores.layers), key=increases.__getitem__)
        lines.append(f"skipping one layer costs least at layer {layer}: loss {increases[layer]:+.1%}")
    if scores.jacobian is not None:
        deviations = [layer.deviation for layer in scores.jacobian.layers]
        layer = min(range(scores.layers), key=deviations.__getitem__)
        lines.append(
            f"||J - I||_F / d is {deviations[layer]:.3g} at layer {layer}, the nearest to the identity, "
            f"and {max(deviations):.3g} at the farthest"
        )
    if scores.effective_depth is not None:
        depth = scores.effective_depth
        lines.append(f"E = {depth.effective} effective layers, W = {depth.wasted} wasted, of {scores.layers}")
    return "\n".join(lines)
