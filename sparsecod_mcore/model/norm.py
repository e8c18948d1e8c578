"""Norms: RMSNorm for Megatron's local spec, one of queries and keys of all heads, and one whose output is scaled."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
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


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm of a token's queries, or keys, of all heads together, over tensor-parallel ranks (OLMoE, 2409.02060).

    Every rank holds the weight of all heads and uses its own heads' part. The gradient of the rest is zero, so that
    Megatron's sum over TP, which it takes of every ``q_layernorm`` and ``k_layernorm``, is the gradient of the whole.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int) -> None:
        """`hidden_size` is the width of one head, of `heads`."""
        super().__init__()
        if config.layernorm_zero_centered_gamma:
            raise UserError("cod.full_width_qk_norm knows no layernorm_zero_centered_gamma")
        self.group = parallel_state.get_tensor_model_parallel_group()
        if heads % self.group.size():
            raise UserError(
                f"cod.full_width_qk_norm needs a tensor parallel size that divides the {heads} heads, "
                f"not {self.group.size()}"
            )
        self.eps = eps
        weight_D = torch.ones(heads * hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight_D)

    def forward(self, x_SBNH: torch.Tensor) -> torch.Tensor:
        """Normalise this rank's heads [sequence, batch, heads, width]; same shape and dtype out."""
        N, H = x_SBNH.shape[-2:]
        x = x_SBNH.to(torch.promote_types(x_SBNH.dtype, torch.float32))
        squares_SB11 = reduce_from_tensor_model_parallel_region(x.square().sum((-2, -1), keepdim=True), self.group)
        squares_SB11 = copy_to_tensor_model_parallel_region(squares_SB11, self.group)
        weight_NH = self.weight.view(-1, N, H)[self.group.rank()]
        return (x * torch.rsqrt(squares_SB11 / len(self.weight) + self.eps)).to(x_SBNH.dtype) * weight_NH


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
