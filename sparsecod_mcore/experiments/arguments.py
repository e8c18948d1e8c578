"""Megatron's arguments for a configuration on any number of GPUs, validated without any."""

import contextlib
import functools
import io
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.training.vocab_utils import calculate_padded_vocab_size

from sparsecod_mcore import config
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.train.input_checks import check_layout
from sparsecod_mcore.train.pretrain import validate

# Whose parameters and FLOPs the formulas here do not count.
_NOT_COUNTED = (
    "add_bias_linear",
    "add_qkv_bias",
    "multi_latent_attention",
    "mtp_num_layers",
    "qk_layernorm",
    "moe_latent_size",
    "moe_shared_expert_gate",
    "attention_output_gate",
    "experimental_attention_variant",
    "hybrid_layer_pattern",
)


_parser = functools.cache(config.build_parser)  # takes a tenth of a second


def padded_vocabulary(args: Namespace, tensor: int) -> int:
    """Size of the vocabulary that so many tensor parallel ranks share evenly."""
    size: int = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, tensor, logging_enabled=False
    )
    return size


def planned_arguments(path: Path, flags: Sequence[str] = (), *, gpus: int = 1) -> Namespace:
    """Arguments of `path` and `flags`, as Megatron validates and completes them for a job of `gpus` processes.

    Raises `UserError` for what training would refuse, and for models whose size is not counted here.
    """
    args = _parser().parse_args(config.with_config(["--config", str(path), *flags]))
    args.rank, args.local_rank, args.world_size = 0, 0, gpus
    if args.vocab_size is None and args.padded_vocab_size is None:
        raise UserError(f"{path} does not tell the vocabulary's size; --vocab-size N does")
    counted_otherwise = [name for name in _NOT_COUNTED if getattr(args, name, None)]
    if counted_otherwise or args.position_embedding_type != "rope":
        reason = ", ".join(counted_otherwise) or f"position_embedding_type {args.position_embedding_type}"
        raise UserError(
            f"{path}: models with {reason} are not planned for; Llama's architecture is, with experts or not"
        )
    check_layout(args)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not determine rank", category=UserWarning)
        validate(args)
    if args.padded_vocab_size is None:
        args.padded_vocab_size = padded_vocabulary(args, args.tensor_model_parallel_size)
    if not args.group_query_attention:
        args.num_query_groups = args.num_attention_heads
    return args
