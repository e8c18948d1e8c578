"""Small models with random weights, and what there is in another format, on this process alone."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from sparsecod_mcore.exchange.hugging_face import HuggingFaceModel
from sparsecod_mcore.model.build import build_model, evaluation_arguments
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.stack import Stack, load_stack

GQA: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 100,
    "num_attention_heads": 6,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 10,
    "max_position_embeddings": 128,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 97,
    "padded_vocab_size": 112,
}
# The first layer is dense.
MOE = GQA | {
    "num_experts": 4,
    "moe_ffn_hidden_size": 40,
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_topk": 2,
    "moe_layer_freq": [0, 1, 1],
    "moe_token_dispatcher_type": "alltoall",
}


def random_stack(settings: dict[str, Any], std: float = 0.3) -> Stack:
    return _random(settings, std)[0]


def save_random_checkpoint(settings: dict[str, Any], folder: Path, std: float = 0.3) -> Stack:
    """A random stack, saved as a torch_dist checkpoint."""
    stack, args = _random(settings, std)
    folder.mkdir()
    dist_checkpointing.save({"model": stack.model.sharded_state_dict(), "args": args}, str(folder))
    return stack


def save_as_megatron(model: Path, folder: Path) -> None:
    """A Hugging Face directory as a torch_dist checkpoint."""
    stack = load_stack(model)
    args = evaluation_arguments(HuggingFaceModel(model).settings, torch.float32)
    folder.mkdir()
    dist_checkpointing.save({"model": stack.model.sharded_state_dict(), "args": args}, str(folder))


def _random(settings: dict[str, Any], std: float) -> tuple[Stack, Namespace]:
    parallel.initialise()
    args = evaluation_arguments(settings, torch.float32)
    model = build_model(args)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):  # not the weights of norms
            parameter.data.normal_(0, std, generator=generator)
    return Stack(model, settings["vocab_size"]), args


def random_tokens(sequences: int, length: int, vocab_size: int = 97) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (sequences, length), generator=generator)
