"""Entropy (Eq. 21-23) and sparsity (Eq. 15, 16) of attention, by head, without its matrix.

Queries and keys, with position embeddings in them, are taken where they enter each layer's core attention.
Axes: S positions, B sequences, H heads of this rank, G of its key heads, D head width; L layers, N heads of the model,
E thresholds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.ops import attention_stats, flash_attention_jvp
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.results import SPARSITY_THRESHOLDS, AttentionAtLength
from sparsecod_mcore.scoring.stack import Stack


class AttentionMeter:
    """Sums over the sequences of one length that pass through a stack while `measuring`."""

    def __init__(self, stack: Stack) -> None:
        """Raises `UserError` where attention is not softmax over all earlier tokens."""
        self._stack = stack
        config = stack.model.config
        unsupported = [name for name in ("window_size", "softmax_type") if _differs(config, name)]
        if unsupported or not all(isinstance(layer.self_attention, SelfAttention) for layer in stack.layers):
            what = unsupported[0] if unsupported else type(stack.layers[0].self_attention).__name__
            raise UserError(f"attention with {what} cannot be measured, only causal softmax attention over all tokens")
        shape = (stack.num_layers, config.num_attention_heads)
        self._entropy_LN = torch.zeros(shape, dtype=torch.float64, device=stack.device)
        self._counts_LNE = torch.zeros(*shape, len(SPARSITY_THRESHOLDS), dtype=torch.int64, device=stack.device)
        self._sequences = 0
        self._length = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what passes through the stack's layers meanwhile."""
        hooks = [
            layer.self_attention.core_attention.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, layer in enumerate(self._stack.layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: int) -> Any:
        def measure(core: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            scale: Any = core.softmax_scale
            self._add(layer, args[0], args[1], scale)

        return measure

    @torch.no_grad()
    def _add(self, layer: int, q_SBHD: torch.Tensor, k_SBGD: torch.Tensor, scale: float | None) -> None:
        length, sequences, heads, width = q_SBHD.shape
        assert self._length in (0, length)
        self._length = length
        if layer == 0:
            self._sequences += sequences
        scale = width**-0.5 if scale is None else scale
        q_BHSD, k_BGSD = q_SBHD.permute(1, 2, 0, 3), k_SBGD.permute(1, 2, 0, 3)
        lse_BHS = log_sum_exp(q_BHSD, k_BGSD, scale)
        entropy_BH, counts_BHE = attention_stats(q_BHSD, k_BGSD, lse_BHS, scale, SPARSITY_THRESHOLDS)
        first = parallel_state.get_tensor_model_parallel_rank() * heads
        self._entropy_LN[layer, first : first + heads] += entropy_BH.sum(0)
        self._counts_LNE[layer, first : first + heads] += counts_BHE.sum(0)

    def result(self) -> AttentionAtLength:
        """The averages over all sequences of all ranks. Collective over all ranks."""
        # Ranks that hold other experts see the same attention.
        counts_here = parallel_state.get_expert_model_parallel_rank() == 0
        leads = parallel.is_first_of_worker()
        totals = torch.tensor([self._sequences * leads, self._length * leads], device=self._stack.device)
        entropy_LN, counts_LNE = self._entropy_LN * counts_here, self._counts_LNE * counts_here
        longest = totals[1:].clone()  # a rank may have had no sequence
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        for total in (totals, entropy_LN, counts_LNE):
            dist.all_reduce(total)
        sequences, length = int(totals[0]), int(longest)
        return _averages(entropy_LN.cpu(), counts_LNE.cpu(), sequences, length)


def _averages(entropy_LN: torch.Tensor, counts_LNE: torch.Tensor, sequences: int, length: int) -> AttentionAtLength:
    entropy_LN = entropy_LN / (sequences * length)
    visible, entries = length * (length + 1) // 2, length**2
    causal_ELN = (counts_LNE.double() / (sequences * visible)).permute(2, 0, 1)
    # The entries that no query sees are zeros.
    full_ELN = 1 - (1 - causal_ELN) * (visible / entries)
    by_threshold = [str(threshold) for threshold in SPARSITY_THRESHOLDS]

    def named(values_E: torch.Tensor) -> Any:
        return dict(zip(by_threshold, values_E.tolist(), strict=True))

    return AttentionAtLength(
        sequences=sequences,
        entropy_mean=float(entropy_LN.mean()),
        entropy=entropy_LN.mean(1).tolist(),
        entropy_heads=entropy_LN.tolist(),
        sparsity_causal_mean=named(causal_ELN.mean((1, 2))),
        sparsity_causal=named(causal_ELN.mean(2)),
        sparsity_causal_heads=named(causal_ELN),
        sparsity_full_mean=named(full_ELN.mean((1, 2))),
        sparsity_full=named(full_ELN.mean(2)),
    )


def log_sum_exp(q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, scale: float) -> torch.Tensor:
    """ln sum_j exp(scale q_i . k_j) over the keys j <= i, [B, H, S], in float32 (float64 for float64)."""
    group = q_BHSD.shape[1] // k_BGSD.shape[1]
    if q_BHSD.device.type == "cpu":  # PyTorch's kernel knows no groups; it takes a third of the time of the other
        k_BHSD = k_BGSD.repeat_interleave(group, 1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return flash(q_BHSD, k_BHSD, k_BHSD, 0.0, True, scale=scale)[1]
    none_q, none_k = (q_BHSD.new_zeros(1).expand_as(x) for x in (q_BHSD, k_BGSD))
    return flash_attention_jvp(q_BHSD, k_BGSD, k_BGSD, none_q, none_k, none_k, scale)[2]


def _differs(config: Any, name: str) -> bool:
    return getattr(config, name, None) not in (None, "vanilla")
