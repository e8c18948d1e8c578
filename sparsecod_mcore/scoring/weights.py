"""Weight sparsity: the share of parameters with |θ| < ε (Eq. 14), of every tensor, every layer and the model."""

import re
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, is_main_replica

from sparsecod_mcore.ops import count_below
from sparsecod_mcore.scoring.results import SPARSITY_THRESHOLDS, TensorSparsity, WeightSparsity
from sparsecod_mcore.scoring.stack import Stack

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# What tells the experts that a rank holds from each other: modules of their own, or numbered weights of one module.
_LOCAL_EXPERT = re.compile(r"(?<=\.experts)\.local_experts\.\d+(?=\.)|(?<=\.weight)\d+$|(?<=\.bias)\d+$")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def weight_sparsity(stack: Stack) -> WeightSparsity:
    """Count the parameters of the whole model, whatever part of it each rank holds. Collective over all ranks.

    What a checkpoint would write once counts once: replicas on other ranks do not, nor do tied embeddings twice, nor
    rows that pad the vocabulary. The experts of a layer are one tensor, as in Megatron's checkpoints.
    """
    counts_by_name = _reduced_counts(_own_parameters(stack), stack.device)
    by_layer: dict[int, torch.Tensor] = {}
    tensors = {}
    for name, counts_E in counts_by_name.items():
        layer = _layer_of(name)
        if layer is not None:
            by_layer[layer] = by_layer.get(layer, 0) + counts_E
        tensors[name] = TensorSparsity(layer=layer, parameters=int(counts_E[-1]), sparsity=_sparsity(counts_E))
    total_E = torch.stack(list(counts_by_name.values())).sum(0)
    layers = [_sparsity(by_layer[layer]) for layer in range(stack.num_layers)]
    return WeightSparsity(
        parameters=int(total_E[-1]),
        model=_sparsity(total_E),
        layers={threshold: [sparsity[threshold] for sparsity in layers] for threshold in _sparsity(total_E)},
        tensors=tensors,
    )


def _own_parameters(stack: Stack) -> dict[str, list[torch.Tensor]]:
    """By name, in the same order on every rank, the parameters or parts of them that no other rank counts."""
    sharded = stack.model.sharded_state_dict()
    own: dict[str, list[torch.Tensor]] = {}
    for name, parameter in stack.model.named_parameters():  # which has what is tied once
        parts = own.setdefault(_LOCAL_EXPERT.sub("", name), [])
        if is_main_replica(sharded[name].replica_id):
            parts.append(_without_padding(name, parameter.detach(), sharded[name], stack.vocab_size))
    return own


def _without_padding(name: str, parameter: torch.Tensor, sharded: ShardedBase, vocab_size: int) -> torch.Tensor:
    if name not in _VOCABULARY:
        return parameter
    assert isinstance(sharded, ShardedTensor)
    return parameter[: max(0, vocab_size - sharded.global_offset[0])]


def _reduced_counts(own: Mapping[str, list[torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """Counts [thresholds + 1] by name over all ranks, on the host; the last is the number of parameters."""
    parts = [(row, part) for row, of_name in enumerate(own.values()) for part in of_name]
    counts_NE = torch.zeros(len(own), len(SPARSITY_THRESHOLDS) + 1, dtype=torch.int64)
    if parts:
        rows_P = torch.tensor([row for row, _ in parts])
        counts_NE[:, :-1].index_add_(0, rows_P, count_below([part for _, part in parts], SPARSITY_THRESHOLDS).cpu())
        counts_NE[:, -1].index_add_(0, rows_P, torch.tensor([part.numel() for _, part in parts]))
    counts_NE = counts_NE.to(device)  # where collectives are
    dist.all_reduce(counts_NE)
    return dict(zip(own, counts_NE.cpu(), strict=True))


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def _sparsity(counts_E: torch.Tensor) -> dict[str, float]:
    *below, parameters = counts_E.tolist()
    return {str(threshold): count / parameters for threshold, count in zip(SPARSITY_THRESHOLDS, below, strict=True)}
