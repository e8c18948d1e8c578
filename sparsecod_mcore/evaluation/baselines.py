"""What those score on multiple-choice questions who do not read them: guessers, and lovers of long or short answers."""

import math
from collections.abc import Callable, Sequence

from sparsecod_mcore.evaluation.results import Estimate, Item


def random_guess(items: Sequence[Item]) -> Estimate:
    """Expected accuracy of a uniform choice, and the standard deviation of a guesser's accuracy on these items."""
    chances = [len(item.right) / len(item.characters) for item in items]
    variance = math.fsum(chance * (1 - chance) for chance in chances)
    return Estimate(value=math.fsum(chances) / len(items), stderr=math.sqrt(variance) / len(items))


def by_length(items: Sequence[Item], best: Callable[[Sequence[int]], int]) -> Estimate:
    """Accuracy of taking a choice whose number of characters is the `best`, max or min; of equals, any alike."""
    return Estimate.of_mean([_chance(item, best(item.characters)) for item in items])


def _chance(item: Item, length: int) -> float:
    equals = [index for index, characters in enumerate(item.characters) if characters == length]
    return len(set(equals) & set(item.right)) / len(equals)
