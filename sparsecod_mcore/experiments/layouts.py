"""How a model is spread over GPUs: the parallel sizes that are possible, and those that are suggested."""

from argparse import Namespace
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.experiments.arguments import padded_vocabulary
from sparsecod_mcore.experiments.gpus import Gpu
from sparsecod_mcore.experiments.memory import Memory, estimate_memory

_FILLED = 0.92  # of a GPU's memory at most
_MOST_TOKENS = 32768  # of a micro-batch on one GPU: beyond, matrix products do not get faster


@dataclass(frozen=True, kw_only=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int
    micro_batch: int
    recompute: bool = False

    @property
    def flags(self) -> list[str]:
        """Megatron's, in full but for sizes of 1."""
        sizes = {
            "--tensor-model-parallel-size": self.tensor,
            "--pipeline-model-parallel-size": self.pipeline,
            "--context-parallel-size": self.context,
            "--expert-model-parallel-size": self.expert,
        }
        flags = [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
        if self.tensor > 1:
            flags.append("--sequence-parallel")
        if self.expert > 1:
            flags += ["--expert-tensor-parallel-size", "1"]
        if self.recompute:
            flags += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
        return [*flags, "--micro-batch-size", str(self.micro_batch)]


def layout_of(args: Namespace) -> Layout:
    """That of validated `args`."""
    return Layout(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        data=args.data_parallel_size,
        micro_batch=args.micro_batch_size,
        recompute=args.recompute_granularity == "full",
    )


def with_layout(args: Namespace, layout: Layout) -> Namespace:
    """Validated `args` laid out otherwise, for estimates; `planned_arguments` with the layout's flags validates it."""
    padded = args.vocab_size is not None and args.padded_vocab_size == padded_vocabulary(
        args, args.tensor_model_parallel_size
    )
    args = copy(args)
    if padded:
        args.padded_vocab_size = padded_vocabulary(args, layout.tensor)
    args.tensor_model_parallel_size, args.pipeline_model_parallel_size = layout.tensor, layout.pipeline
    args.context_parallel_size, args.expert_model_parallel_size = layout.context, layout.expert
    args.expert_tensor_parallel_size = 1 if layout.expert > 1 else layout.tensor
    args.data_parallel_size, args.micro_batch_size = layout.data, layout.micro_batch
    args.world_size = layout.data * layout.tensor * layout.pipeline * layout.context
    args.sequence_parallel = layout.tensor > 1
    args.recompute_granularity = "full" if layout.recompute else None
    args.recompute_method = "uniform" if layout.recompute else None
    return args


def suggest_layout(args: Namespace, gpus: int, gpu: Gpu) -> tuple[Layout, Memory]:
    """The layout of `gpus` GPUs that cuts the model least and fits, of the validated one-GPU `args`.

    Cutting costs communication: pipelines most, then contexts, then tensors; experts least. Then it is better not to
    recompute, and to have large micro-batches. Raises `UserError` where nothing is possible or fits.
    """
    return next(possible_layouts(args, gpus, gpu))


def possible_layouts(args: Namespace, gpus: int, gpu: Gpu) -> Iterator[tuple[Layout, Memory]]:
    """Layouts that fit, of the validated one-GPU `args`, those first that cut the model least.

    Raises `UserError`, before the first, where nothing is possible or fits.
    """
    least: Memory | None = None
    fits = False
    for layout in sorted(_possible(args, gpus, gpu), key=_cost):
        memory = estimate_memory(with_layout(args, layout))
        if memory.total <= _FILLED * gpu.memory:
            fits = True
            yield layout, memory
        if least is None or memory.total < least.total:
            least = memory
    if fits:
        return
    if least is None:
        raise UserError(
            f"{gpus} GPUs can not share {args.num_attention_heads} heads, {args.num_layers} layers and a global batch "
            f"of {args.global_batch_size} evenly in any layout; another number of GPUs or global_batch_size can"
        )
    raise UserError(
        f"no layout of {gpus} {gpu.kind} fits: the leanest takes {least.total / 1e9:.0f} GB of a GPU's "
        f"{gpu.memory / 1e9:.0f} (of which {_FILLED:.0%} are used); more GPUs, or larger ones, do"
    )


def _cost(layout: Layout) -> tuple[float, ...]:
    cut = layout.tensor * layout.pipeline * layout.context
    return cut, layout.pipeline, layout.context, layout.recompute, layout.expert, -layout.micro_batch


def _possible(args: Namespace, gpus: int, gpu: Gpu) -> Iterator[Layout]:
    in_node = _powers_of_two(min(gpus, gpu.per_node))
    for tensor in in_node:
        groups = args.num_query_groups
        if args.num_attention_heads % tensor or max(groups, tensor) % min(groups, tensor):
            continue
        for pipeline in (size for size in range(1, min(gpus, args.num_layers) + 1) if args.num_layers % size == 0):
            for context in in_node:
                if gpus % (tensor * pipeline * context) or args.seq_length % (2 * context):
                    continue
                data = gpus // (tensor * pipeline * context)
                for expert in _expert_sizes(args, gpus // pipeline):
                    yield from _micro_batches(args, tensor, pipeline, context, expert, data)


def _expert_sizes(args: Namespace, ranks: int) -> list[int]:
    """Of the ranks of one pipeline stage, each of which may hold other experts."""
    if args.num_experts is None:
        return [1]
    return [size for size in _powers_of_two(ranks) if args.num_experts % size == 0 and ranks % size == 0]


def _micro_batches(
    args: Namespace, tensor: int, pipeline: int, context: int, expert: int, data: int
) -> Iterator[Layout]:
    if args.global_batch_size % data:
        return
    per_replica = args.global_batch_size // data
    for size in _powers_of_two(per_replica):
        fills_pipeline = per_replica // size >= pipeline
        small = size == 1 or size * args.seq_length / context <= _MOST_TOKENS
        if per_replica % size == 0 and fills_pipeline and small:
            for recompute in (False, True):
                yield Layout(
                    tensor=tensor, pipeline=pipeline, context=context, expert=expert, data=data, micro_batch=size,
                    recompute=recompute,
                )  # fmt: skip


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
