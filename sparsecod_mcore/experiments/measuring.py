"""What measuring sends: the collectives of the monitor and of Jacobian probes, from the shapes that they reduce.

`monitor.reduction` adds up the moments of residual adds and the sums of columns; `jvp.statistics` the sums of probes;
a probed layer runs the collectives of its own linear maps (`jvp.rules`, `jvp.moe`) once more, on all directions at
once. Calls are those of one step on average: what happens every n-th step counts 1 / n.
"""

from sparsecod_mcore.experiments.collectives import Collective, Kind, Operation, among_several
from sparsecod_mcore.experiments.groups import Group
from sparsecod_mcore.experiments.stages import Stage
from sparsecod_mcore.jvp.probes import NUM_PARTS, Probing
from sparsecod_mcore.jvp.probes import STREAMS as JACOBIAN_STREAMS
from sparsecod_mcore.model.residual import ADDS_PER_LAYER
from sparsecod_mcore.monitor.reduction import MAXIMA
from sparsecod_mcore.ops import NUM_MOMENTS

_DOUBLE = 8  # bytes


def measuring_collectives(stage: Stage) -> list[Collective]:
    """Of the statistics and probes that the stage's arguments ask for, without collectives among one rank."""
    return among_several([*_moments(stage), *_columns(stage), *_probes(stage)])


def _call(kind: Kind, operation: Operation, group: Group, payload: float, calls: float) -> Collective:
    return Collective(kind=kind, operation=operation, group=group, payload=payload, calls=calls, in_step=True)


def _moments(stage: Stage) -> list[Collective]:
    """Once a log interval: sums and maxima [I, L, A, M] of the measured steps since the last."""
    args = stage.args
    if not args.cod_stats_interval:
        return []
    measured = max(1.0, args.log_interval / args.cod_stats_interval)
    interval = max(args.log_interval, args.cod_stats_interval)
    adds = measured * args.num_layers * ADDS_PER_LAYER
    return [
        _call("statistics", "all_reduce", stage.groups.world, adds * moments * _DOUBLE, 1 / interval)
        for moments in (NUM_MOMENTS, len(MAXIMA))
    ]


def _columns(stage: Stage) -> list[Collective]:
    """Every `kurtosis_interval` steps, of single dimensions: means [L, A, 1 + D], two central moments [2, L, A, D]."""
    args = stage.args
    if not (args.cod_stats_interval and args.cod_kurtosis_interval):
        return []
    adds = args.num_layers * ADDS_PER_LAYER
    return [
        _call("statistics", "all_reduce", stage.groups.world, adds * width * _DOUBLE, 1 / args.cod_kurtosis_interval)
        for width in (1 + args.hidden_size, 2 * args.hidden_size)
    ]


def _probes(stage: Stage) -> list[Collective]:
    """Every `jacobian_interval` steps: one batch of P shared and R own directions through each layer, then the sums."""
    args, groups = stage.args, stage.groups
    if not args.cod_jacobian_interval:
        return []
    probing = Probing(
        args.cod_jacobian_probes,
        args.micro_batch_size * args.data_parallel_size,
        args.cod_jacobian_directions == "residual",
    )
    share = 1 / args.cod_jacobian_interval
    layers, shared = args.num_layers, probing.num_probes
    own = probing.rounds + probing.along_residual
    streams = layers * len(JACOBIAN_STREAMS)
    squares = streams * probing.rounds * args.micro_batch_size
    # Sums of u and v u of both parts; tokens, norms of h and sequences; two sums of squares, and two along h.
    sums = layers * NUM_PARTS * shared * (args.hidden_size + 1) + 3 * layers + streams * 4
    found = [
        _call("probes", "all_reduce", groups.tensor_context, squares * _DOUBLE, share),
        _call("probes", "all_reduce", groups.world, sums * _DOUBLE, share),
    ]
    for one in _layer(stage, shared, own):
        found.append(_call("probes", one.operation, one.group, one.payload, share * one.calls))
    return found


def _layer(stage: Stage, shared: int, own: int) -> list[Collective]:
    """Of all layers of the stage, each probed once. A value travels with its tangents."""
    args, groups = stage.args, stage.groups
    tensor, dense = groups.tensor, stage.layers - stage.moe_layers
    every = 1 + shared + own
    found: list[Collective] = []

    def call(operation: Operation, group: Group, payload: float, calls: int) -> None:
        found.append(_call("probes", operation, group, payload, calls))

    gathers = args.sequence_parallel
    brings_together: Operation = "reduce_scatter" if gathers else "all_reduce"
    if gathers:
        call("all_gather", tensor, (1 + own) * stage.activation, stage.layers)  # what queries, keys, values are of
        call("all_gather", tensor, (1 + shared) * stage.tokens * 4, stage.layers)  # the norm's scales, for the shared
        call("all_gather", tensor, every * stage.activation, dense)  # what the MLP is of
    call(brings_together, tensor, every * stage.activation, stage.layers)  # attention's last projection
    # The MLP's last projection takes the shared directions summed over tokens, in a row of each rank's, and the others.
    rows = (1 + shared) * tensor.size * args.hidden_size * stage.element
    call(brings_together, tensor, rows, dense)
    call(brings_together, tensor, (1 + own) * stage.activation, dense)
    if args.num_query_groups < tensor.size:
        heads = stage.tokens * stage.heads_width * stage.element
        call("all_gather", tensor, heads, stage.layers)
        call("all_gather", tensor, own * heads, stage.layers)
        call("all_gather", tensor, shared * stage.heads_width * stage.element, stage.layers)
    groups_held = max(1, args.num_query_groups // tensor.size)
    keys = stage.tokens * args.kv_channels * groups_held * stage.element * groups.context.size
    call("all_gather", groups.context, every * keys, 2 * stage.layers)
    if stage.moe_layers:
        tokens = stage.tokens / (tensor.size if gathers else 1)
        rows_sent = tokens * args.moe_router_topk
        width = every * args.hidden_size + (every - 1) * args.num_experts  # with tangents of every expert's gate
        call("all_to_all", groups.expert, rows_sent * width * stage.element, 2 * stage.moe_layers)
        call("all_to_all", groups.expert, rows_sent * stage.element, stage.moe_layers)
        rows_seen = rows_sent * groups.expert_tensor.size
        call("all_gather", groups.expert_tensor, rows_seen * width * stage.element, stage.moe_layers)
        call("all_gather", groups.expert_tensor, rows_seen * stage.element, stage.moe_layers)
        call("reduce_scatter", groups.expert_tensor, rows_seen * width * stage.element, stage.moe_layers)
        call("all_gather", groups.tensor_expert, 8 * args.num_experts * groups.tensor_expert.size, stage.moe_layers)
        if args.moe_shared_expert_intermediate_size:
            if gathers:
                call("all_gather", tensor, every * stage.activation, stage.moe_layers)
            call(brings_together, tensor, every * stage.activation, stage.moe_layers)
    return found
