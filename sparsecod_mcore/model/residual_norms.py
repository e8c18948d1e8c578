"""Residual adds with a norm in them: behind the branch (sandwich), or behind the sum (post-norm)."""

import torch
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_mcore.model.residual import MeasuredResidualAdd, Sums


class _NormedResidualAdd(MeasuredResidualAdd):
    """Holds a norm. Megatron builds a layer's adds without arguments; so the spec gives them all."""

    def __init__(self, config: TransformerConfig, build: LayerNormBuilder) -> None:
        super().__init__()
        self.norm = build(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def normalise(self, x_SBD: torch.Tensor, branch_SBD: torch.Tensor) -> torch.Tensor:
        """norm(x), in the dtype of x.

        Megatron enables gradients around every add: without a branch that carries them there is no backward, and
        under full recomputation the first forward would keep what it is to forget.
        """
        with torch.set_grad_enabled(branch_SBD.requires_grad and torch.is_grad_enabled()):
            return self.norm(x_SBD).to(x_SBD.dtype)


class BranchNormResidualAdd(_NormedResidualAdd):
    """y = h + norm(f): what is measured as the branch is norm(f), which is what the stream gets."""

    def join(self, branch: torch.Tensor, residual: torch.Tensor, sums: Sums | None) -> torch.Tensor:
        return super().join(self.normalise(branch, branch), residual, sums)


class PostNormResidualAdd(_NormedResidualAdd):
    """y = norm(alpha h + f). What is measured as the branch is y - h: what the stream gains, whatever the formula.

    So y, and not the sum before the norm, counts as the stream, and Var(y) = Var(h) + Var(y - h) + 2 Cov(h, y - h).
    """

    def __init__(self, config: TransformerConfig, build: LayerNormBuilder, alpha: float = 1.0) -> None:
        super().__init__(config, build)
        self.alpha = alpha

    def join(self, branch: torch.Tensor, residual: torch.Tensor, sums: Sums | None) -> torch.Tensor:
        y = self.normalise(self.alpha * residual + branch, branch)
        if sums is not None:
            with torch.no_grad():  # beside the training, whose y is not rounded once more
                super().join(y - residual, residual, sums)
        return y
