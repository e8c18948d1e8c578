"""Forward-mode rules of mixtures of experts.

Which experts a token goes to is piecewise constant: the routing set is held fixed, its gate values are differentiated.
A token travels to its experts, by the layer's own dispatcher, with its tangents and those of its gates side by side.

Axes: T tokens, E experts of the layer, W = (1 + P) D + P E what travels of one token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.autograd import forward_ad

from sparsecod_mcore.jvp.dual import Dual, all_reduce, gather_sequence, project, reduce_scatter_sequence
from sparsecod_mcore.jvp.rules import jvp, swiglu, unknown, unsupported

# What the configuration of a mixture may hold that these rules do not cover.
UNSUPPORTED = (
    "add_bias_linear",
    "moe_latent_size",
    "moe_expert_capacity_factor",
    "moe_apply_probs_on_input",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
    "moe_input_jitter_eps",
    "moe_enable_routing_replay",
)


@jvp.register
def _(module: MoELayer, x: Dual) -> Dual:
    for name in UNSUPPORTED:
        if getattr(module.config, name, None):
            raise unsupported(module, name)
    gates, routing_map_TE = route(module.router, x)
    num_tangents, num_experts = gates.tangents.shape[0], gates.tangents.shape[-1]

    with _without_shared_experts(module.token_dispatcher) as dispatcher:
        sent_SBW = _pack(x, gates.tangents.unflatten(1, x.value.shape[:-1]))
        sent, gate_T = dispatcher.dispatch_preprocess(sent_SBW, routing_map_TE, gates.value)
        sent, gate_T = dispatcher.token_dispatch(sent, gate_T)
        sent_TW, tokens_per_expert, gate_T = dispatcher.dispatch_postprocess(sent, gate_T)

        tokens, gate_tangents_PTE = _unpack(sent_TW, num_tangents, num_experts)
        counts = tokens_per_expert.tolist()
        expert_T = torch.tensor(module.local_expert_indices).repeat_interleave(torch.tensor(counts))
        expert_PT1 = expert_T.to(sent_TW.device).expand(num_tangents, -1).unsqueeze(-1)
        gate = Dual(gate_T, gate_tangents_PTE.gather(-1, expert_PT1).squeeze(-1))
        answers_TW = _pack(experts(module.experts, tokens, counts, gate), gate_tangents_PTE)

        combined = dispatcher.token_combine(dispatcher.combine_preprocess(answers_TW))
        y, _ = _unpack(dispatcher.combine_postprocess(combined), num_tangents, num_experts)
    return y + jvp(module.shared_experts, x) if module.use_shared_expert else y


@contextmanager
def _without_shared_experts(dispatcher: Any) -> Iterator[Any]:
    """The dispatcher, without the shared experts whose work it may hide behind its own; refuses unknown ones."""
    if not isinstance(dispatcher, MoEAlltoAllTokenDispatcher | MoEAllGatherTokenDispatcher):
        raise unknown(dispatcher)
    shared_experts, dispatcher.shared_experts = dispatcher.shared_experts, None
    try:
        yield dispatcher
    finally:
        dispatcher.shared_experts = shared_experts


def _pack(x: Dual, gate_tangents: Tensor) -> Tensor:
    """x [..., D] with its tangents, and tangents [P, ..., E] of gates, as one tensor [..., W]."""
    along_last = (t.movedim(0, -2).flatten(-2) for t in (x.tangents, gate_tangents))
    return torch.cat([x.value, *along_last], -1)


def _unpack(packed: Tensor, num_tangents: int, num_experts: int) -> tuple[Dual, Tensor]:
    """What `_pack` was given."""
    of_gates = num_tangents * num_experts
    width = (packed.shape[-1] - of_gates) // (1 + num_tangents)
    value, tangents, gate_tangents = packed.split([width, num_tangents * width, of_gates], -1)
    first = (t.unflatten(-1, (num_tangents, -1)).movedim(-2, 0) for t in (tangents, gate_tangents))
    tangents, gate_tangents = first
    return Dual(value, tangents), gate_tangents


def route(router: TopKRouter, x: Dual) -> tuple[Dual, Tensor]:
    """Gate values [T, E], zero for experts that are not chosen, with tangents [P, T, E]; and who is chosen [T, E].

    Megatron's own function of the logits is differentiated, in PyTorch's forward mode, which holds the top-k fixed.
    """
    if not isinstance(router, TopKRouter):
        raise unknown(router)
    if router.routing_type in ("sinkhorn", "quantile_balancing"):
        raise unsupported(router, router.routing_type)
    config = router.config
    value_TE = router.gating(x.value).flatten(0, -2)
    logits = project(x.to(value_TE.dtype), router.weight.to(value_TE.dtype)).tangents.flatten(1, -2)

    def gates(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return topk_routing_with_score_function(
            logits_TE,
            router.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=router.score_function,
            expert_bias=router.expert_bias,
        )

    with forward_ad.dual_level():
        rows = value_TE.repeat(len(logits), 1)  # a token's gates depend on its logits alone: tangents are more tokens
        dual, _ = gates(forward_ad.make_dual(rows, logits.flatten(0, 1)))
        tangents = forward_ad.unpack_dual(dual).tangent.unflatten(0, logits.shape[:2])
    chosen_gates_TE, routing_map_TE = gates(value_TE)
    return Dual(chosen_gates_TE, tangents), routing_map_TE


@singledispatch
def experts(module: torch.nn.Module, tokens: Dual, counts: list[int], gate: Dual) -> Dual:
    """What this rank's experts make of their tokens [T, D], sorted by expert, `counts` for each; times gate [T]."""
    raise unknown(module)


@experts.register
def _(module: SequentialMLP, tokens: Dual, counts: list[int], gate: Dual) -> Dual:
    parts = zip(module.local_experts, *(_split(x, counts) for x in (tokens, gate)), strict=True)
    answers = [expert_mlp(expert, own, own_gate) for expert, own, own_gate in parts]
    values, tangents = zip(*answers, strict=True)
    return Dual(torch.cat(values), torch.cat(tangents, 1))


def _split(x: Dual, counts: list[int]) -> list[Dual]:
    return [Dual(*pair) for pair in zip(x.value.split(counts), x.tangents.split(counts, 1), strict=True)]


def expert_mlp(module: MLP, tokens: Dual, gate: Dual) -> Dual:
    """One expert on its tokens [T, D]; its activation [T, F] is scaled by the gate [T] before the last projection."""
    return jvp(module.linear_fc2, scale(swiglu(module, jvp(module.linear_fc1, tokens)), gate))


def scale(x: Dual, gate: Dual) -> Dual:
    """x [..., D] times a factor [...] of each row."""
    value, factor = x.value, gate.value.unsqueeze(-1)
    tangents = x.tangents * factor + value * gate.tangents.unsqueeze(-1)
    return Dual((value * factor).to(value.dtype), tangents.to(value.dtype))


@jvp.register
def _(module: SharedExpertMLP, x: Dual) -> Dual:
    if type(module) is not SharedExpertMLP:
        raise unknown(module)
    overlapped = module.config.moe_shared_expert_overlap  # then the dispatcher runs the collectives of its projections
    parallel = module.config.sequence_parallel
    given = gather_sequence(x, module.tp_group) if overlapped and parallel else x
    y = jvp(module.linear_fc2, swiglu(module, jvp(module.linear_fc1, given)))
    if overlapped:
        y = (reduce_scatter_sequence if parallel else all_reduce)(y, module.tp_group)
    if not module.use_shared_expert_gate:
        return y
    logit = project(x, module.gate_weight).map(lambda t: t.squeeze(-1))
    sigmoid = logit.value.sigmoid()
    return scale(y, Dual(sigmoid, sigmoid * (1 - sigmoid) * logit.tangents))
