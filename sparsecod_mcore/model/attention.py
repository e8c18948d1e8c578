"""Core attention of the local spec on PyTorch's scaled_dot_product_attention: no S x S scores in memory, GQA, CP.

Axes: S query positions of this rank, T key positions of all context-parallel ranks, B batch, N heads, G query groups,
H head width.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_mcore.errors import UserError


def zigzag_positions(sequence_length: int, context_parallel_size: int, rank: int) -> torch.Tensor:
    """Positions [S] of the tokens that `rank` holds: chunks `rank` and `2 * size - 1 - rank` of 2 * size equal ones.

    Megatron deals sequences out this way so that every rank has the same share of the causal triangle.
    """
    chunks = torch.arange(sequence_length).chunk(2 * context_parallel_size)
    return torch.cat([chunks[rank], chunks[2 * context_parallel_size - 1 - rank]])


class SDPACoreAttention(MegatronModule):
    """Causal softmax(q k^T / sqrt(H)) v. Under context parallelism keys and values are gathered from all ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        unsupported = ("window_size", "apply_query_key_layer_scaling")
        given = [name for name in unsupported if getattr(config, name, None)]
        if given or getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise UserError(f"the local attention has no {', '.join(given) or 'softmax_type'}; Transformer Engine has")
        self.context_parallel_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        q_SBNH: torch.Tensor,
        k_SBGH: torch.Tensor,
        v_SBGH: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Return the context [S, B, N * H]. The mask is always causal; packed sequences are refused."""
        assert packed_seq_params is None and attention_bias is None
        causal_mask_ST = None
        if self.config.context_parallel_size > 1:
            k_SBGH = gather_from_sequence_parallel_region(k_SBGH, group=self.context_parallel_group)
            v_SBGH = gather_from_sequence_parallel_region(v_SBGH, group=self.context_parallel_group)
            causal_mask_ST = self._causal_mask(k_SBGH.shape[0], q_SBNH.device)
        q_BNSH, k_BGTH, v_BGTH = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGH))
        dropout = self.dropout if self.training else 0.0
        # Tensor-parallel ranks hold other heads, and must drop other entries of them.
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            context_BNSH = torch.nn.functional.scaled_dot_product_attention(
                q_BNSH,
                k_BGTH,
                v_BGTH,
                attn_mask=causal_mask_ST,
                dropout_p=dropout,
                is_causal=causal_mask_ST is None,
                scale=self.softmax_scale,
                enable_gqa=q_BNSH.shape[1] != k_BGTH.shape[1],
            )
        return context_BNSH.permute(2, 0, 1, 3).flatten(2)

    def _causal_mask(self, sequence_length: int, device: torch.device) -> torch.Tensor:
        size = self.config.context_parallel_size
        positions = [zigzag_positions(sequence_length, size, rank) for rank in range(size)]
        query_S = positions[self.context_parallel_group.rank()].to(device)
        key_T = torch.cat(positions).to(device)
        return query_S[:, None] >= key_T[None, :]
