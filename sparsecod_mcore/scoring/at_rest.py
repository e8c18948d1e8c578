"""What `tools/measure_sparsity.py` measures, as scores: read off while the model runs as it is."""

from contextlib import AbstractContextManager
from typing import Any

from sparsecod_mcore.scoring.attention import AttentionMeter
from sparsecod_mcore.scoring.moments import MomentsMeter
from sparsecod_mcore.scoring.results import Attention, Moments, WeightSparsity
from sparsecod_mcore.scoring.score import Measured, Options, Score
from sparsecod_mcore.scoring.stack import Stack
from sparsecod_mcore.scoring.weights import weight_sparsity


class WeightSparsityScore(Score):
    """Eq. 14."""

    name = "weight_sparsity"

    def result(self, measured: Measured) -> WeightSparsity:
        return weight_sparsity(self.stack)


class AttentionScore(Score):
    """Sparsity (Eq. 15, 16) and entropy (Eq. 21-23) of attention at the length of the data."""

    name = "attention"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        self.meter = AttentionMeter(stack)

    def watching(self) -> AbstractContextManager[Any]:
        return self.meter.measuring()

    def result(self, measured: Measured) -> Attention:
        return Attention(lengths={str(measured.tokens_NT.shape[1] - 1): self.meter.result()})


class MomentsScore(Score):
    """Variance, covariance and kurtosis of every stream."""

    name = "moments"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        self.meter = MomentsMeter(stack)

    def watching(self) -> AbstractContextManager[Any]:
        return self.meter.measuring()

    def result(self, measured: Measured) -> Moments:
        sequences, length = measured.tokens_NT.shape
        return self.meter.result(sequences, length - 1)
