"""What can be known to be wrong before training starts, each told in one sentence."""

from argparse import Namespace
from pathlib import Path

from sparsecod_mcore.data import (
    Manifest,
    check_dataset,
    check_vocabulary,
    load_tokenizer,
    manifest_path,
    megatron_tokenizer_arguments,
    read_manifest,
)
from sparsecod_mcore.errors import UserError


def fill_in_data(args: Namespace) -> None:
    """Turn ``cod.data`` and ``cod.tokenizer`` into Megatron's flags, where the user gave them."""
    if args.cod_data is not None:
        args.train_data_path = [f"{args.cod_data}_train"]
        manifest = _manifest(args)
        if manifest is None or "valid" in manifest.splits:
            args.valid_data_path = [f"{args.cod_data}_valid"]
    if args.cod_tokenizer is not None:
        tokenizer = load_tokenizer(args.cod_tokenizer, _eos_token(args))
        for name, value in megatron_tokenizer_arguments(tokenizer).items():
            setattr(args, name, value)
    if args.train_data_path is not None and args.valid_data_path is None:
        args.eval_iters, args.full_validation = 0, False


def _manifest(args: Namespace) -> Manifest | None:
    return None if args.cod_data is None else read_manifest(manifest_path(f"{args.cod_data}_train"))


def _eos_token(args: Namespace) -> str | None:
    """The end-of-text token that the data was made with, where it says so."""
    manifest = _manifest(args)
    return None if manifest is None else manifest.origin["tokenizer"]["eos_token"]


def check_data(args: Namespace) -> None:
    """Every dataset that training would read exists, is whole, and was made with the given tokenizer."""
    paths = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    prefixes = [Path(word) for path in paths for word in path or () if not _is_number(word)]
    elsewhere = args.mock_data or args.data_args_path or args.per_split_data_args_path
    if not prefixes and not elsewhere:
        raise UserError("no training data is given; --cod-data PREFIX takes what tools/preprocess_data.py made")
    for prefix in prefixes:
        check_dataset(prefix)
        # Data that does not say what it was made with is read whole, by one process.
        if args.cod_tokenizer is not None and args.rank == 0:
            check_vocabulary(prefix, args.cod_tokenizer, _eos_token(args))


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
    decay_iters = args.lr_decay_iters or args.train_iters
    if decay_iters is not None and args.lr_warmup_fraction is None and args.lr_warmup_iters >= decay_iters:
        raise UserError(
            f"lr_warmup_iters {args.lr_warmup_iters} must be below the {decay_iters} iterations of the schedule"
        )
    for flag, number in (("--log-interval", args.log_interval), ("--ddp-num-buckets", args.ddp_num_buckets)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number} is given, 1 or more is accepted")
    ranks_of_a_model = tensor * pipeline * args.context_parallel_size
    if args.world_size % ranks_of_a_model:
        raise UserError(
            f"{args.world_size} processes are not divisible by tensor x pipeline x context parallel size "
            f"{tensor} x {pipeline} x {args.context_parallel_size}"
        )
    if args.num_experts is not None and tensor > 1 and not args.sequence_parallel:
        raise UserError("mixture of experts with tensor parallelism needs sequence_parallel: true")
    if args.reset_attention_mask:
        raise UserError("reset_attention_mask is not supported: attention is causal over the whole sequence")
    if args.full_validation and (tensor > 1 or pipeline > 1):
        raise UserError(
            "full_validation works without tensor and pipeline parallelism only; eval_iters takes its place"
        )
    if args.cuda_graph_impl != "none" and args.cod_stats_interval:
        raise UserError(
            "CUDA graphs would replay the statistics of the step they were captured in; "
            "give --cod-stats-interval 0 or --cuda-graph-impl none"
        )
