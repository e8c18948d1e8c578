"""One forward-mode rule per type of module: norms, linear layers and the MLP.

Attention's rules stand in attention.py, those of mixtures of experts in moe.py, Transformer Engine's in
transformer_engine.py. A rule takes the module and its input as a `Dual` and returns its output as a `Dual`, biases
added, with the collectives that the module itself runs. Dropout is left out: derivatives are those of evaluation.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import singledispatch

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.jvp.dual import Dual, all_reduce, gather_sequence, project, reduce_scatter_sequence
from sparsecod_mcore.model.norm import AllHeadsRMSNorm, RMSNorm, ScaledNorm
from sparsecod_mcore.ops import rms_norm_jvp, swiglu_jvp


@singledispatch
def jvp(module: torch.nn.Module, x: Dual) -> Dual:
    """Output of `module` and its tangents, for the input x [..., D].

    Raises UserError for a type of module that no rule is registered for.
    """
    raise unknown(module)


def unknown(module: torch.nn.Module) -> UserError:
    """What to say of a module that has no rule."""
    kind = type(module)
    return UserError(
        f"no Jacobian rule for {kind.__module__}.{kind.__qualname__}: register one with "
        f"@sparsecod_mcore.jvp.jvp.register, or do without Jacobians (in training: cod.jacobian_interval 0)"
    )


def unsupported(module: torch.nn.Module, what: str) -> UserError:
    """What to say of a module whose rule does not cover how it is configured."""
    kind = type(module).__name__
    return UserError(
        f"the Jacobian rule of {kind} does not know {what}: do without Jacobians (in training: cod.jacobian_interval 0)"
    )


@jvp.register
def _(module: IdentityOp, x: Dual) -> Dual:
    return x


@jvp.register
def _(module: RMSNorm, x: Dual) -> Dual:
    return rms_norm(x, module.weight, module.eps)


@jvp.register
def _(module: AllHeadsRMSNorm, x: Dual) -> Dual:
    if module.group.size() > 1:
        raise unsupported(module, "tensor parallelism")
    heads = x.value.shape[-2:]
    return rms_norm(x.map(lambda t: t.flatten(-2)), module.weight, module.eps).map(lambda t: t.unflatten(-1, heads))


@jvp.register
def _(module: torch.nn.RMSNorm, x: Dual) -> Dual:
    assert module.weight is not None and module.eps is not None
    return rms_norm(x, module.weight, module.eps)


@jvp.register
def _(module: ScaledNorm, x: Dual) -> Dual:
    return jvp(module.norm, x).map(lambda t: module.scale * t)


def rms_norm(x: Dual, weight_D: Tensor, eps: float) -> Dual:
    """w x / sqrt(mean(x^2) + eps) over the last axis."""
    weight_D = weight_D if weight_D.dtype == torch.float32 else weight_D.to(x.value.dtype)
    if not len(x.tangents):  # which the operator does not take
        return Dual(torch.nn.functional.rms_norm(x.value, weight_D.shape, weight_D, eps), x.tangents)
    return Dual(*rms_norm_jvp(x.value, x.tangents, weight_D, eps))


@jvp.register
def _(module: torch.nn.LayerNorm, x: Dual) -> Dual:
    return layer_norm(x, module.weight, module.bias, module.eps)


def layer_norm(x: Dual, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Dual:
    """w (x - m) / sqrt(var + eps) + b over the last axis: centring is linear, and what remains is an RMSNorm."""
    dtype = torch.promote_types(x.value.dtype, torch.float32)
    centred = x.to(dtype).map(lambda t: t - t.mean(-1, keepdim=True))
    y = rms_norm(centred, weight_D.to(dtype), eps)
    shifted = y.value if bias_D is None else y.value + bias_D
    return Dual(shifted, y.tangents).to(x.value.dtype)


_known_outputs: ContextVar[Mapping[torch.nn.Module, Tensor]] = ContextVar("known_outputs", default={})  # noqa: B039


@contextmanager
def known_outputs(outputs: Mapping[torch.nn.Module, Tensor]) -> Iterator[None]:
    """What linear layers have put out, without bias, for the very values that rules are about to be given."""
    token = _known_outputs.set(outputs)
    try:
        yield
    finally:
        _known_outputs.reset(token)


def _known(module: ColumnParallelLinear | RowParallelLinear) -> Tensor | None:
    """Not among tensor-parallel ranks, where values and tangents share collectives, nor with a bias."""
    if module.tp_group.size() > 1 or module.bias is not None:
        return None
    return _known_outputs.get().get(module)


@jvp.register
def _(module: ColumnParallelLinear, x: Dual) -> Dual:
    if module.gather_output:
        raise unsupported(module, "gather_output")
    if module.sequence_parallel and not module.explicit_expert_comm:
        x = gather_sequence(x, module.tp_group)
    return project(x, module.weight, module.bias, value=_known(module))


@jvp.register
def _(module: RowParallelLinear, x: Dual) -> Dual:
    if not module.input_is_parallel:
        raise unsupported(module, "an input that is not parallel")
    y = project(x, module.weight, value=_known(module))
    if not module.explicit_expert_comm:  # else the token dispatcher sums over ranks
        y = (reduce_scatter_sequence if module.sequence_parallel else all_reduce)(y, module.tp_group)
    return y if module.bias is None else Dual(y.value + module.bias, y.tangents)


@jvp.register
def _(module: MLP, x: Dual) -> Dual:
    if type(module) is not MLP:  # what a subclass does is not known
        raise unknown(module)
    return jvp(module.linear_fc2, swiglu(module, jvp(module.linear_fc1, x)))


@singledispatch
def jvp_with_sums(module: torch.nn.Module, x: Dual, num_summed: int) -> tuple[Tensor, Tensor]:
    """Of the tangents of the output, the first `num_summed` only summed over tokens, [P, D], and the rest, [Q, ..., D].

    Sums over the ranks of a sequence-parallel group add up to the sum over their tokens.
    """
    return summed(jvp(module, x), num_summed)


@jvp_with_sums.register
def _(module: MLP, x: Dual, num_summed: int) -> tuple[Tensor, Tensor]:
    """The last projection is linear: it may as well take the mean, which half precision holds where sums overflow."""
    if type(module) is not MLP:
        return summed(jvp(module, x), num_summed)
    activated = swiglu(module, jvp(module.linear_fc1, x))
    tokens = activated.value[..., 0].numel()
    means_PF = sum_over_tokens(activated.tangents[:num_summed]) / tokens
    # Among as many rows as tensor-parallel ranks, so that the projection can deal them out under sequence parallelism.
    rows_PR1F = means_PF.new_zeros(num_summed, module.config.tensor_model_parallel_size, 1, means_PF.shape[-1])
    rows_PR1F[:, 0, 0] = means_PF
    sums_PD = tokens * jvp(module.linear_fc2, Dual(rows_PR1F[0], rows_PR1F)).tangents.sum((1, 2)).to(means_PF.dtype)
    if len(activated.tangents) == num_summed:
        return sums_PD, x.tangents[num_summed:]
    return sums_PD, jvp(module.linear_fc2, Dual(activated.value, activated.tangents[num_summed:])).tangents


def summed(y: Dual, num_summed: int) -> tuple[Tensor, Tensor]:
    """Of the tangents of y, the first summed over tokens, and the rest."""
    return sum_over_tokens(y.tangents[:num_summed]), y.tangents[num_summed:]


def sum_over_tokens(tangents: Tensor) -> Tensor:
    """[P, ..., D] to [P, D], in float32 at least."""
    return tangents.flatten(1, -2).sum(1, dtype=torch.promote_types(tangents.dtype, torch.float32))


def is_swiglu(config: TransformerConfig) -> bool:
    """Whether MLPs compute silu(a) b of their first projection's [a, b], with nothing added, clamped or scaled."""
    plain_swiglu = config.gated_linear_unit and config.activation_func == torch.nn.functional.silu
    return plain_swiglu and config.activation_func_clamp_value is None and not config.glu_linear_offset


def swiglu(module: MegatronModule, gate_up: Dual) -> Dual:
    """silu(a) b of [a, b] [..., 2F]; refuses any other activation that `module` is configured for."""
    if not is_swiglu(module.config):
        raise unsupported(module, "activations other than SwiGLU")
    return Dual(*swiglu_jvp(gate_up.value, gate_up.tangents))
