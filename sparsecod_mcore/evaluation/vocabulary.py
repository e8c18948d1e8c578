"""What a model says of single tokens, over a vocabulary that tensor-parallel ranks hold in parts.

Axes: N tokens, D hidden width, V vocabulary of this tensor-parallel rank.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from sparsecod_mcore.scoring.stack import Stack

_LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}


@torch.no_grad()
def predictions(stack: Stack, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `targets_N` after `hidden_ND`, rows of h_L, in float32, and the token that is most probable.

    Over the vocabulary without what pads it, as an exported model has it. Of equally probable tokens the first.
    Collective over tensor-parallel ranks.
    """
    tokens_at_once = max(1, _LOGITS_AT_ONCE[stack.device.type] // stack.model.output_layer.output_size_per_partition)
    parts = zip(hidden_ND.split(tokens_at_once), targets_N.split(tokens_at_once), strict=True)
    log_probabilities, most_probable = zip(*(_predictions(stack, *part) for part in parts), strict=True)
    return torch.cat(log_probabilities), torch.cat(most_probable)


def _predictions(stack: Stack, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model, group = stack.model, stack.model.pg_collection.tp
    tied = model.share_embeddings_and_output_weights
    weight_VD = model.shared_embedding_or_output_weight() if tied else None
    logits_N1V, _ = model.output_layer(model.decoder.final_layernorm(hidden_ND.unsqueeze(1)), weight=weight_VD)
    logits_NV = model._scale_logits(logits_N1V).squeeze(1).float()
    first = group.rank() * logits_NV.shape[1]
    logits_NV[:, max(0, stack.vocab_size - first) :] = -torch.inf

    mine_N, index_N = logits_NV.max(dim=-1)
    highest_N = mine_N.clone()
    dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=group)
    most_probable_N = torch.where(mine_N == highest_N, index_N + first, stack.vocab_size)
    dist.all_reduce(most_probable_N, op=dist.ReduceOp.MIN, group=group)
    return -vocab_parallel_cross_entropy(logits_NV, targets_N, tp_group=group), most_probable_N  # overwrites the logits
