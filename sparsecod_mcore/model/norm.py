"""Norms: RMSNorm for Megatron's local spec, and one whose output is scaled."""

from typing import Any

import torch
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_mcore.errors import UserError


class RMSNorm(torch.nn.Module):
    """y = w * x / sqrt(mean_d(x^2) + eps) over the last axis, computed in float32 (Zhang & Sennrich 2019).

    Upstream's local norm refuses sequence parallelism. There, each TP rank normalises its own tokens and so holds a
    partial gradient of the weight: the attribute ``sequence_parallel`` asks Megatron to sum it over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        if config.layernorm_zero_centered_gamma:
            raise UserError("the local RMSNorm knows no layernorm_zero_centered_gamma; Transformer Engine's does")
        self.eps = eps
        weight_D = torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight_D)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        """Normalise `x_SBD` [sequence, batch, hidden]; same shape and dtype out."""
        return torch.nn.functional.rms_norm(x_SBD, self.weight.shape, self.weight, self.eps)


class ScaledNorm(torch.nn.Module):
    """y = scale * norm(x), for a norm of any kind."""

    def __init__(self, build: LayerNormBuilder, scale: float, **arguments: Any) -> None:
        """`build` makes the norm of `arguments`, which are those of every norm of a spec."""
        super().__init__()
        self.norm = build(**arguments)
        self.scale = scale

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        """Normalise and scale `x_SBD` [sequence, batch, hidden]; same shape and dtype out."""
        return self.scale * self.norm(x_SBD)
