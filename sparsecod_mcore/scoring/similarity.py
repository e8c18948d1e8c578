"""How alike layers' outputs are, averaged over tokens."""

import torch

from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.results import Similarity
from sparsecod_mcore.scoring.score import Chunk, Measured, Options, Score
from sparsecod_mcore.scoring.stack import Stack


class SimilarityScore(Score):
    """Cosine of the token means of h_{l+1}."""

    name = "similarity"

    def __init__(self, stack: Stack, options: Options) -> None:
        super().__init__(stack, options)
        self.sum_LD = torch.zeros(stack.num_layers, stack.hidden_size, dtype=torch.float64, device=stack.device)

    def observe(self, chunk: Chunk, layer: int, before_SBD: torch.Tensor, after_SBD: torch.Tensor) -> None:
        self.sum_LD[layer] += after_SBD.sum((0, 1), dtype=torch.float64)

    def gather(self) -> None:
        parallel.sum_over_workers(self.sum_LD)

    def result(self, measured: Measured) -> Similarity:
        direction_LD = torch.nn.functional.normalize(self.sum_LD, dim=1)
        return Similarity(matrix=(direction_LD @ direction_LD.T).tolist())
