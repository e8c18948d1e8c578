"""What can be known to be wrong before training starts, each told in one sentence."""

from argparse import Namespace
from pathlib import Path

from sparsecod_mcore.data import check_dataset, check_vocabulary, load_tokenizer, megatron_tokenizer_arguments
from sparsecod_mcore.errors import UserError


def fill_in_data(args: Namespace) -> None:
    """Turn ``cod.data`` and ``cod.tokenizer`` into Megatron's flags, where the user gave them."""
    if args.cod_data is not None:
        args.train_data_path = [f"{args.cod_data}_train"]
        args.valid_data_path = [f"{args.cod_data}_valid"]
    if args.cod_tokenizer is not None:
        for name, value in megatron_tokenizer_arguments(load_tokenizer(args.cod_tokenizer)).items():
            setattr(args, name, value)


def check_data(args: Namespace) -> None:
    """Every dataset that training would read exists, is whole, and was made with the given tokenizer."""
    paths = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    prefixes = [Path(word) for path in paths for word in path or () if not _is_number(word)]
    if not prefixes and not args.mock_data:
        raise UserError("no training data is given; --cod-data PREFIX takes what tools/preprocess_data.py made")
    for prefix in prefixes:
        check_dataset(prefix)
        # Data that does not say what it was made with is read whole, by one process.
        if args.cod_tokenizer is not None and args.rank == 0:
            check_vocabulary(prefix, args.cod_tokenizer)


def _is_number(word: str) -> bool:
    """Blends alternate weights and prefixes."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def check_layout(args: Namespace) -> None:
    """The model can be cut the way the parallel layout wants it."""
    tensor, expert, pipeline = (
        args.tensor_model_parallel_size,
        args.expert_model_parallel_size,
        args.pipeline_model_parallel_size,
    )
    heads, groups = args.num_attention_heads, args.num_query_groups if args.group_query_attention else None
    for name, value in (("num_layers", args.num_layers), ("num_attention_heads", heads)):
        if value is None:
            raise UserError(f"{name} is not given")
    if heads % tensor:
        raise UserError(f"num_attention_heads {heads} is not divisible by tensor_model_parallel_size {tensor}")
    if groups is not None and groups > 1 and max(groups, tensor) % min(groups, tensor):
        raise UserError(
            f"num_query_groups {groups} neither divides tensor_model_parallel_size {tensor} nor is divisible by it"
        )
    if args.num_experts is not None and args.num_experts % expert:
        raise UserError(f"num_experts {args.num_experts} is not divisible by expert_model_parallel_size {expert}")
    ranks_of_a_model = tensor * pipeline * args.context_parallel_size
    if args.world_size % ranks_of_a_model:
        raise UserError(
            f"{args.world_size} processes are not divisible by tensor x pipeline x context parallel size "
            f"{tensor} x {pipeline} x {args.context_parallel_size}"
        )
    if args.num_experts is not None and tensor > 1 and not args.sequence_parallel:
        raise UserError("mixture of experts with tensor parallelism needs sequence_parallel: true")
    if args.transformer_impl == "local" and args.reset_attention_mask:
        raise UserError(
            "reset_attention_mask needs transformer_impl: transformer_engine; the local attention is causal only"
        )
