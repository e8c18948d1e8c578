"""What training sends: every collective of one GPU in one step, by kind, with its bytes.

Counted from the code of Megatron 0.19.2 and of this project that runs them, not from a paper's formula; tests and
benchmarks/communication.py hold the counts against intercepted calls of real jobs. Symbols in comments: T tokens of a
micro-batch on one GPU before tensor parallel ranks share them out, H hidden size, Q and G widths of all query and
key-value heads, F width of the MLP, V padded vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from sparsecod_mcore.experiments.buckets import Padding, fill_buckets
from sparsecod_mcore.experiments.groups import Group
from sparsecod_mcore.experiments.stages import Stage

type Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast", "barrier"]
# "control" are numbers that ranks agree on; "statistics" and "probes" are this project's own (measuring.py).
type Kind = Literal["tensor", "context", "pipeline", "data", "expert", "control", "statistics", "probes"]

# How often the bytes of a payload leave a GPU, per (n - 1) / n of a group of n. A point-to-point send leaves once.
_PASSES: dict[Operation, float] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
_BUCKET = 40_000_000  # parameters at least; Megatron's default, DistributedDataParallelConfig.bucket_size
_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal calls of one GPU. A payload is the whole buffer: of a gather its result, of a scatter its input."""

    kind: Kind
    operation: Operation
    group: Group
    payload: float  # bytes of one call
    calls: float  # in a micro-batch, or in a step
    in_step: bool = False  # once a step, not once a micro-batch
    beside: float = 0.0  # floating-point operations of this GPU that Megatron lets run beside one call
    during: Literal["forward", "backward"] | None = None  # the pass that Megatron lets run beside what is once a step

    @property
    def sent(self) -> float:
        """Bytes that leave this GPU in one call, by the algorithms that send least (rings)."""
        size = self.group.size
        return self.payload * (_PASSES[self.operation] * (size - 1) / size if self.operation in _PASSES else 1.0)


def training_collectives(stage: Stage, *, ring: bool = True) -> list[Collective]:
    """What Megatron sends on a GPU of `stage` in a training step, without collectives among one rank.

    `ring`: context parallelism as Transformer Engine does it, from neighbour to neighbour; else as this project's own
    attention, which gathers keys and values.
    """
    found = (
        *_tensor(stage),
        *_context(stage, ring),
        *_experts(stage),
        *_pipeline(stage),
        *_data(stage),
        *_control(stage),
    )
    return among_several(found)


def among_several(collectives: Iterable[Collective]) -> list[Collective]:
    """Those that have anybody to talk to."""
    return [one for one in collectives if one.group.size > 1 and one.calls and one.payload]


def _tensor(stage: Stage) -> Iterator[Collective]:
    args, group = stage.args, stage.groups.tensor
    width, tensor = args.hidden_size, args.tensor_model_parallel_size

    def call(operation: Operation, payload: float, calls: float, beside: float = 0.0) -> Collective:
        return Collective(kind="tensor", operation=operation, group=group, payload=payload, calls=calls, beside=beside)

    def pair(first: float, second: float, calls: int, forwards: int) -> Iterator[Collective]:
        """Two linear layers, column and row parallel, of `first` and `second` parameters, `calls` times."""
        product_1, product_2 = (2 * stage.tokens * size / tensor for size in (first, second))
        # Transformer Engine's overlap cuts products up, and sends one piece while the next is computed.
        cut_1, cut_2 = (product_1, product_2) if args.tp_comm_overlap else (0.0, 0.0)
        if args.sequence_parallel:
            yield call("all_gather", stage.activation, calls * forwards, cut_1)
            yield call("reduce_scatter", stage.activation, calls * forwards, cut_2)
            yield call("all_gather", stage.activation, calls, cut_2)  # the output's gradient
            yield call("all_gather", stage.activation, calls, product_1)  # the input again, beside its gradient
            yield call("reduce_scatter", stage.activation, calls, product_1)  # beside the weight's gradient
        else:
            yield call("all_reduce", stage.activation, calls * forwards, cut_2)
            yield call("all_reduce", stage.activation, calls, product_1)  # beside the weight's gradient

    matrices = 2 if args.swiglu else 1
    query = args.kv_channels * args.num_attention_heads
    shared = args.moe_shared_expert_intermediate_size or 0
    yield from pair(width * stage.heads_width, width * query, stage.layers, stage.forwards)
    dense = stage.layers - stage.moe_layers
    yield from pair(matrices * width * args.ffn_hidden_size, width * args.ffn_hidden_size, dense, stage.forwards)
    if shared:
        yield from pair(matrices * width * shared, width * shared, stage.moe_layers, stage.forwards)
    if args.num_query_groups < tensor:  # a group's heads are spread over ranks, and gathered
        heads = stage.tokens * stage.heads_width * stage.element
        yield call("all_gather", heads, stage.layers * stage.forwards)
        yield call("reduce_scatter", heads, stage.layers)
    batch = args.micro_batch_size * args.seq_length
    if stage.first:
        if args.sequence_parallel:
            yield call("reduce_scatter", stage.activation, 1)
            yield call("all_gather", stage.activation, 1)
        else:
            yield call("all_reduce", stage.activation, 1)
        yield call("broadcast", 8 * batch, 2)  # tokens and their positions
    if stage.last:
        logits = 2 * stage.tokens * width * args.padded_vocab_size / tensor
        if args.sequence_parallel:
            yield call("all_gather", stage.activation, 1)
            yield call("all_gather", stage.activation, 1, logits)
            yield call("reduce_scatter", stage.activation, 1, logits)
        else:
            yield call("all_reduce", stage.activation, 1, logits)
        if args.cross_entropy_loss_fusion:
            yield call("all_reduce", 4 * stage.tokens, 1)
            yield call("all_reduce", 8 * stage.tokens, 1)
        else:
            yield call("all_reduce", 4 * stage.tokens, 3)  # maximum, logit of the label, sum of exponentials
        yield call("broadcast", 8 * batch, 1)  # labels
        yield call("broadcast", 4 * batch, 1)  # loss mask
    if args.sequence_parallel:  # weights that every rank applies to tokens of its own
        router = stage.moe_layers * width * (args.num_experts or 0)
        payload = (stage.norm_parameters + router) * stage.gradient
        yield Collective(kind="tensor", operation="all_reduce", group=group, payload=payload, calls=1, in_step=True)


def _context(stage: Stage, ring: bool) -> Iterator[Collective]:
    args, group = stage.args, stage.groups.context
    size = group.size
    groups_held = max(1, args.num_query_groups // args.tensor_model_parallel_size)
    keys = stage.tokens * args.kv_channels * groups_held * stage.element  # values are as large
    if ring:
        # Of the causal triangle every rank computes an equal part against each other's keys; it is what hides a send.
        heads = args.num_attention_heads / args.tensor_model_parallel_size
        forward = 2 * stage.tokens * args.seq_length * args.kv_channels * heads / size
        backward = 2.5 * forward  # five products where the forward pass has two
        passes = ((stage.forwards * (size - 1), 2, forward), (size - 1, 4, backward), (1, 2, 0.0))
        for sends, tensors, beside in passes:  # backward, keys and values travel with their gradients; those come home
            yield Collective(
                kind="context", operation="send", group=group, payload=tensors * keys, calls=stage.layers * sends,
                beside=beside,
            )  # fmt: skip
    else:
        gathered: tuple[tuple[Operation, int], ...] = (("all_gather", 2 * stage.forwards), ("reduce_scatter", 2))
        for operation, calls in gathered:
            yield Collective(
                kind="context", operation=operation, group=group, payload=size * keys, calls=stage.layers * calls
            )


def _experts(stage: Stage) -> Iterator[Collective]:
    """The all-to-all dispatcher: rows go to the ranks of their experts, and come back; gates go with them."""
    args, groups, layers = stage.args, stage.groups, stage.moe_layers
    if not layers:
        return
    tokens = stage.tokens / (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    rows = tokens * args.moe_router_topk
    gate = 4 if args.moe_router_dtype == "fp32" else 8 if args.moe_router_dtype == "fp64" else stage.element
    passes = stage.forwards + 1

    def call(operation: Operation, group: Group, payload: float, calls: float) -> Collective:
        return Collective(kind="expert", operation=operation, group=group, payload=payload, calls=calls * layers)

    yield call("all_to_all", groups.expert, rows * args.hidden_size * stage.element, 2 * passes)
    yield call("all_to_all", groups.expert, rows * gate, passes)
    # Who sends how many rows to whom, int64, in every forward pass.
    counts = 8 * args.num_experts * groups.tensor_expert.size
    yield call("all_gather", groups.tensor_expert, counts, stage.forwards)
    if args.moe_aux_loss_coeff and "aux_loss" in args.moe_router_load_balancing_type:
        yield call("all_reduce", groups.tensor_context, 8 * args.num_experts, stage.forwards)
    group = groups.expert_tensor  # the ranks that share an expert see each other's rows
    gathered = rows * group.size
    for payload in (gathered * args.hidden_size * stage.element, gathered * gate):
        yield call("all_gather", group, payload, stage.forwards)
        yield call("reduce_scatter", group, payload, 1)
    yield call("reduce_scatter", group, gathered * args.hidden_size * stage.element, stage.forwards)
    yield call("all_gather", group, gathered * args.hidden_size * stage.element, 1)


def _pipeline(stage: Stage) -> Iterator[Collective]:
    args, groups = stage.args, stage.groups
    payload = stage.activation / (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    # The ends of virtual stages are neighbours as well, but for the very first and the very last.
    sends = (stage.chunks - stage.last) + (stage.chunks - stage.first)
    beside = math.inf if args.overlap_p2p_comm else 0.0  # with virtual stages, the next one's pass
    yield Collective(
        kind="pipeline", operation="send", group=groups.pipeline, payload=payload, calls=sends, beside=beside
    )
    if not args.untie_embeddings_and_output_weights and (stage.first or stage.last):
        embedding = args.padded_vocab_size * args.hidden_size / args.tensor_model_parallel_size
        yield Collective(
            kind="pipeline", operation="all_reduce", group=groups.ends, payload=embedding * stage.gradient, calls=1,
            in_step=True,
        )  # fmt: skip


def _data(stage: Stage) -> Iterator[Collective]:
    """Gradients and weights, bucket by bucket; where experts are apart, of two optimizers."""
    args, groups = stage.args, stage.groups
    apart = _experts_apart(stage)
    sizes: tuple[tuple[Operation, int], ...] = (("all_reduce", stage.gradient),)
    if args.use_distributed_optimizer:
        sizes = (("reduce_scatter", stage.gradient), ("all_gather", stage.element))
    # Dense weights and experts have an optimizer each, and either gathers all weights, unless layers do it.
    gathers = 2 if apart and not args.overlap_param_gather else 1
    for chunk, group in product(range(stage.chunks), (groups.data, groups.expert_data) if apart else (groups.data,)):
        of_experts = group is groups.expert_data
        held = [one for one in stage.parameters(chunk) if not apart or one.expert == of_experts]
        padding = Padding(group.size, args.ddp_pad_buckets_for_high_nccl_busbw)
        threshold = _bucket_size(stage) if chunk == 0 else None
        buckets = list(fill_buckets(held, threshold, padding if args.use_distributed_optimizer else None))
        # That of the first weights: nothing is left to compute when it is filled, nothing can be before it is gathered.
        alone = len(buckets) - 1 if chunk == 0 else None
        for (elements, hides), number in Counter((size, at != alone) for at, size in enumerate(buckets)).items():
            for operation, size in sizes:
                gathering = operation == "all_gather"
                overlaps = hides and (args.overlap_param_gather if gathering else args.overlap_grad_reduce)
                yield Collective(
                    kind="data", operation=operation, group=group, payload=elements * size,
                    calls=number * (gathers if gathering else 1), in_step=True,
                    during=("forward" if gathering else "backward") if overlaps else None,
                )  # fmt: skip


def _experts_apart(stage: Stage) -> bool:
    """Whether experts have gradients and an optimizer apart from dense weights'; not if they are cut as those are."""
    groups = stage.groups
    cut_otherwise = groups.expert.size > 1 or groups.expert_tensor.size != groups.tensor.size
    return stage.args.num_experts is not None and cut_otherwise


def _bucket_size(stage: Stage) -> float | None:
    """Elements that fill a bucket of the first chunk, experts or not; None for one bucket, as in later stages."""
    args = stage.args
    if not args.overlap_grad_reduce or not stage.first or args.overlap_param_gather_with_optimizer_step:
        return None
    if args.ddp_num_buckets is not None:
        return (stage.dense_parameters + stage.expert_parameters) // args.ddp_num_buckets
    if args.ddp_bucket_size is not None:
        return float(args.ddp_bucket_size)
    return max(_BUCKET, _BUCKET_PER_RANK * stage.groups.data.size)


def _control(stage: Stage) -> Iterator[Collective]:
    """Numbers that ranks agree on in every step, each in a call of its own; what they cost is latency."""
    args, groups = stage.args, stage.groups
    with_experts = args.num_experts is not None

    def agree(group: Group, calls: int, payload: float = 4.0) -> Collective:
        return Collective(
            kind="control", operation="all_reduce", group=group, payload=payload, calls=calls, in_step=True
        )

    # The gradient's norm, of experts for itself; then whether the step succeeded, the norm again, the learning rate.
    yield agree(groups.everyone if args.use_distributed_optimizer else groups.model, 1)
    if _experts_apart(stage) and not args.use_distributed_optimizer:
        yield agree(groups.expert_model, 1)
    yield agree(groups.model, 3)
    if stage.last:
        yield agree(groups.data, 1, 8.0)  # the loss and its tokens
    if args.exit_signal_handler:
        yield agree(groups.world, 1, 8.0)
    # Losses of routers, by layer.
    for given, group in ((args.moe_aux_loss_coeff, groups.tensor_context), (args.moe_z_loss_coeff, groups.stage)):
        if with_experts and given:
            for among in (groups.pipeline, group, groups.data):
                yield agree(among, 1, 4.0 * args.num_layers)
    # Megatron's timer of an interval waits for all ranks when it stops and when it starts.
    yield Collective(
        kind="control", operation="barrier", group=groups.world, payload=1, calls=2 / args.log_interval, in_step=True
    )
