"""What Megatron makes of a folder."""

from pathlib import Path

import torch

from sparsecod_mcore.scoring.stack import Stack, load_stack


@torch.no_grad()
def stack_logits(stack: Stack, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V], of this rank's part of the vocabulary under tensor parallelism."""
    hidden_SBD = stack.embed(tokens_BS)
    for layer in range(stack.num_layers):
        hidden_SBD = stack.layer(layer, hidden_SBD)
    model = stack.model
    weight_VD = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    logits_SBV, _ = model.output_layer(model.decoder.final_layernorm(hidden_SBD), weight=weight_VD)
    return logits_SBV.transpose(0, 1)


def logits(folder: Path, tokens_BS: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return stack_logits(load_stack(folder), tokens_BS)[..., :vocab_size]


@torch.no_grad()
def mean_loss(folder: Path, tokens_BS: torch.Tensor) -> float:
    """Of predicting all but the first token of each sequence."""
    stack = load_stack(folder)
    hidden_SBD = stack.embed(tokens_BS[:, :-1])
    for layer in range(stack.num_layers):
        hidden_SBD = stack.layer(layer, hidden_SBD)
    return stack.losses(hidden_SBD, tokens_BS[:, 1:]).double().mean().item()
