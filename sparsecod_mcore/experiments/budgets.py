"""Budgets that make runs comparable: equal tokens, equal FLOPs, or equal parameters."""

from collections.abc import Sequence
from typing import Literal

from sparsecod_mcore.experiments.amounts import in_words
from sparsecod_mcore.experiments.parameters import moe_layers
from sparsecod_mcore.experiments.plan import Plan

type Budget = Literal["tokens", "flops", "params"]
_WIDTH_STEP = 8  # widths of tensor cores


def matched_steps(plan: Plan, reference: Plan, budget: Literal["tokens", "flops"]) -> int:
    """Steps after which `plan` has taken the tokens or the FLOPs of the whole of `reference`."""
    taken, whole = (plan.tokens, reference.tokens) if budget == "tokens" else (plan.flops.total, reference.flops.total)
    return round(plan.args.train_iters * whole / taken)


def matched_width(plan: Plan, reference: Plan) -> int | None:
    """Width of the MLP, or of each expert, at which `plan` has the active parameters of `reference`.

    A multiple of 8; None where the rest of the model is larger already.
    """
    args, count = plan.args, plan.parameters
    with_experts = moe_layers(args)
    matrices = 3 if args.swiglu else 2
    shared = (args.moe_shared_expert_intermediate_size or 0) / (args.moe_ffn_hidden_size or 1)
    per_unit = matrices * args.hidden_size * (args.moe_router_topk + shared if with_experts else 1)
    units = with_experts or args.num_layers
    width = args.moe_ffn_hidden_size if with_experts else args.ffn_hidden_size
    wanted = width + (reference.parameters.active - count.active) / (per_unit * units)
    rounded = round(wanted / _WIDTH_STEP) * _WIDTH_STEP
    return rounded if rounded > 0 else None


def describe_match(plans: Sequence[Plan], budget: Budget) -> str:
    """How far each plan's budget is from the first's, and what would make it equal."""
    reference, others = plans[0], plans[1:]
    lines = [f"Equal {'active parameters' if budget == 'params' else budget} to {reference.path.stem}:"]
    for plan in others:
        if budget == "params":
            difference = plan.parameters.active / reference.parameters.active - 1
            width = matched_width(plan, reference)
            key = "moe_ffn_hidden_size" if moe_layers(plan.args) else "ffn_hidden_size"
            advice = "no width of the MLP does it" if width is None else f"{key}: {width}"
        else:
            of_both = [(p.tokens if budget == "tokens" else p.flops.total) for p in (plan, reference)]
            difference = of_both[0] / of_both[1] - 1
            steps = matched_steps(plan, reference, budget)
            tokens = steps * plan.args.global_batch_size * plan.args.seq_length
            advice = f"train_iters: {steps} ({in_words(tokens)} tokens)"
        lines.append(f"  {plan.path.stem}: {difference:+.2%} as configured; {advice}")
    return "\n".join(lines)
