"""Scores by name."""

from collections.abc import Sequence

from megatron.core.transformer.moe.moe_layer import MoELayer

from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.scoring.at_rest import AttentionScore, MomentsScore, WeightSparsityScore
from sparsecod_mcore.scoring.causal import CausalScore
from sparsecod_mcore.scoring.effective_depth import EffectiveDepthScore
from sparsecod_mcore.scoring.jacobian import JacobianScore
from sparsecod_mcore.scoring.moe import MoEScore
from sparsecod_mcore.scoring.permutation import PermutationScore
from sparsecod_mcore.scoring.score import Options, Score
from sparsecod_mcore.scoring.similarity import SimilarityScore
from sparsecod_mcore.scoring.skip import SkipScore
from sparsecod_mcore.scoring.stack import Stack
from sparsecod_mcore.scoring.usefulness import UsefulnessScore

# In the order they are computed: what others need comes before them.
SCORES: dict[str, type[Score]] = {
    score.name: score
    for score in (
        CausalScore,
        PermutationScore,
        UsefulnessScore,
        EffectiveDepthScore,
        SkipScore,
        SimilarityScore,
        JacobianScore,
        WeightSparsityScore,
        AttentionScore,
        MomentsScore,
        MoEScore,
    )
}
DEFAULT_SCORES = tuple(name for name in SCORES if name != MoEScore.name)  # what every model has


def check_names(names: Sequence[str]) -> None:
    """Raise `UserError` for a name that no score has, or for none at all."""
    for name in names:
        if name not in SCORES:
            raise UserError(f"{name!r} is no score{nearest(name, SCORES)}; {', '.join(SCORES)} are")
    if not names:
        raise UserError(f"no score is named; {', '.join(SCORES)} are known")


def names_for(stack: Stack) -> Sequence[str]:
    """All that this model has."""
    return tuple(SCORES) if any(isinstance(layer.mlp, MoELayer) for layer in stack.layers) else DEFAULT_SCORES


def make_scores(names: Sequence[str], stack: Stack, options: Options) -> list[Score]:
    """The scores of these names and those that they need."""
    wanted = set(names)
    for name in reversed(SCORES):
        if name in wanted:
            wanted.update(SCORES[name].needs)
    return [score(stack, options) for name, score in SCORES.items() if name in wanted]
