"""The operators as tests of any device see them: one entry each, for those that exist."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecod_mcore import ops
from tests.ops import oracle

Distribution = Callable[[tuple[int, ...], torch.dtype], Tensor]
Layout = Callable[[Tensor], Tensor]

THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)
ROUNDING = 4 * torch.finfo(torch.float32).eps


def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def large_mean(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) + 30).to(dtype)


def outliers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape)
    x[..., shape[-1] // 3] = 200 if dtype == torch.float16 else 1e4  # products have to stay in range
    return x.to(dtype)


DISTRIBUTIONS = (normal, large_mean, outliers)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def slice_of_wider(x: Tensor) -> Tensor:
    wider = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)[..., 1::2]
    return wider.copy_(x)


def transposed(x: Tensor) -> Tensor:
    order = list(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def unaligned(x: Tensor) -> Tensor:
    """Contiguous, but not on a boundary that loads of 16 bytes need."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS = (contiguous, slice_of_wider, transposed, unaligned)

# What an operator and its reference have in common: called with the function and the arguments, returns all results.
Invoke = Callable[..., list[Tensor]]
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Operator:
    """An operator of sparsecod_mcore.ops and what it is held to.

    arguments(random, shape) makes arguments with random(shape) where content is free; composite(*arguments) gives the
    results of plain PyTorch in the dtype of the arguments, exact(*arguments) those in float64 of the same arguments.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    arguments: Callable[[Callable[[tuple[int, ...]], Tensor], tuple[int, ...]], Arguments]
    invoke: Invoke
    composite: Callable[..., list[Tensor]]
    exact: Callable[..., list[Tensor]]
    error: Callable[[Tensor, Tensor], Tensor] | None = None  # of the second result; default: that of all others
    distributions: tuple[Distribution, ...] = DISTRIBUTIONS

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    def __call__(self, *arguments: Any) -> list[Tensor]:
        return self.invoke(self.function, *arguments)

    def errors(self, results: list[Tensor], exact: list[Tensor]) -> list[Tensor]:
        """Errors of each result: of each element against itself and what is usual among the others."""
        errors = []
        for i, (result, expected) in enumerate(zip(results, exact, strict=True)):
            assert result.shape == expected.shape
            if i == 1 and self.error is not None:
                errors.append(self.error(result.cpu(), expected.cpu()))
                continue
            expected = expected.double()
            scale = expected.abs() + expected.abs().median() if expected.numel() else expected
            error = (result.double() - expected).abs() / scale.where(scale > 0, 1)
            errors.append(error.amax() if error.numel() else error.sum())
        return errors


def to(arguments: Arguments, device: str, layout: Layout = contiguous) -> Arguments:
    """Move the tensors among the arguments to a device, in a layout."""

    def moved(x: Any) -> Any:
        if isinstance(x, list):
            return [moved(y) for y in x]
        return layout(x.to(device)) if isinstance(x, Tensor) else x

    return tuple(map(moved, arguments))


def in_float64(arguments: Arguments) -> Arguments:
    def exact(x: Any) -> Any:
        if isinstance(x, list):
            return [exact(y) for y in x]
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(exact, arguments))


def plain(function: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    results = function(*arguments)
    return [results] if isinstance(results, Tensor) else list(results)


def of_reference(name: str, invoke: Invoke = plain) -> Callable[..., list[Tensor]]:
    """Results of the reference that stands beside the operator."""
    return lambda *arguments: invoke(getattr(ops, f"{name}_reference"), *arguments)


def reference_in_float64(name: str, invoke: Invoke = plain) -> Callable[..., list[Tensor]]:
    return lambda *arguments: invoke(getattr(ops, f"{name}_reference"), *in_float64(arguments))


# residual_add_moments


def add_moments(function: Callable[..., Any], branch: Tensor, residual: Tensor, bias: Tensor) -> list[Tensor]:
    moments = torch.zeros(ops.NUM_MOMENTS, dtype=torch.float64, device=branch.device)
    columns = torch.zeros(ops.NUM_COLUMN_SUMS, branch.shape[-1], dtype=torch.float64, device=branch.device)
    columns[0] = branch[0].double() + residual[0].double()
    columns[0] = columns[0].float().double()
    y = function(branch, residual, moments, bias, columns)
    without_columns = function(branch, residual, torch.zeros_like(moments), bias)
    # Sums of powers of very different sizes: each is a result of its own.
    return [y, moments, *columns[1:], without_columns]


def exact_add_moments(branch: Tensor, residual: Tensor, bias: Tensor) -> list[Tensor]:
    case = oracle.Case(branch.cpu(), residual.cpu(), bias.cpu())
    y = oracle.output(case)
    shift = (case.branch[0].double() + case.residual[0].double()).float().double()
    distance_ND = y.double() - shift
    powers = [(distance_ND**power).sum(0) for power in (1, 2, 3, 4)]
    return [x.to(branch.device) for x in (y, oracle.moments(case), *powers, y)]


# swiglu_jvp, rms_norm_jvp


def jvp_in_float64(function: Callable[..., Tensor], primals: Arguments, tangents: Arguments) -> list[Tensor]:
    return list(torch.func.jvp(function, in_float64(primals), in_float64(tangents)))


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def exact_rms_norm(x: Tensor, x_tangent: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    w = weight.double()
    return jvp_in_float64(lambda x: torch.nn.functional.rms_norm(x, w.shape, w, eps), (x,), (x_tangent,))


# attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention and log-sum-exp of scores; the last query sees all keys."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    hidden_TS = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    hidden_TS = hidden_TS.triu(k.shape[2] - q.shape[2] + 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(hidden_TS, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attention_jvp(*arguments: Tensor) -> list[Tensor]:
    primals, tangents = arguments[:3], arguments[3:]
    (output, lse), (output_tangent, _) = torch.func.jvp(attention, primals, tangents)
    return [output, output_tangent, lse]


def attention_jvp_float64(*arguments: Tensor) -> list[Tensor]:
    return attention_jvp(*in_float64(arguments))


def attention_arguments(random: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Arguments:
    """Arguments q, k, v and their tangents for shape [B, H, H_kv, T, D]."""
    batch, heads, kv_heads, tokens, width = shape
    shapes = [(batch, h, tokens, width) for h in (heads, kv_heads, kv_heads)]
    return tuple(map(random, 2 * shapes))


def stats_arguments(random: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Arguments:
    q, k, v, *_ = attention_arguments(random, shape)
    _, lse = attention(q.double(), k.double(), v.double())
    return q, k, lse.float(), 1 / math.sqrt(q.shape[-1]), list(THRESHOLDS)


# probe_moments, count_below


def probe(function: Callable[..., Any], v: Tensor, u: Tensor) -> list[Tensor]:
    sums = torch.zeros(u.shape[0], u.shape[-1], dtype=torch.float64, device=u.device)
    moments = torch.zeros(u.shape[0], ops.NUM_PROBE_MOMENTS, dtype=torch.float64, device=u.device)
    function(v, u, sums, moments)
    return [sums, *moments.unbind(-1)]


def exact_probe(v: Tensor, u: Tensor) -> list[Tensor]:
    v_PND, u_PND = (v if v.dim() == 3 else v.unsqueeze(1)).double(), u.double()
    tokens = torch.full([len(u)], u.shape[1], device=u.device)
    return [u_PND.sum(1), u_PND.square().sum((1, 2)), (u_PND * v_PND).sum((1, 2)), tokens]


def count_arguments(random: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Arguments:
    """Tensors of several sizes, an empty one among them."""
    sizes = (shape, shape[-1:], (0, 3), (1,))
    return [random(size) * 10.0 ** -(i + 1) for i, size in enumerate(sizes)], list(THRESHOLDS)


MATRICES = ((1, 59), (5, 96), (97, 1120), (123, 2048), (1025, 59), (9, 8192), (3, 16387), (4099, 8))
HEADS = ((1, 2, 1, 1, 32), (2, 4, 2, 97, 64), (1, 3, 3, 123, 40), (1, 8, 1, 257, 128), (1, 2, 2, 130, 256))

OPERATORS = (
    Operator(
        "residual_add_moments",
        MATRICES,
        (7, 96),
        lambda random, shape: (random(shape), random(shape), random(shape[-1:])),
        add_moments,
        of_reference("residual_add_moments", add_moments),
        exact_add_moments,
        error=oracle.error,
    ),
    Operator(
        "swiglu_jvp",
        MATRICES,
        (7, 96),
        lambda random, shape: (random((shape[0], 2 * shape[1])), random((shape[0], 2 * shape[1]))),
        plain,
        of_reference("swiglu_jvp"),
        lambda x, tangent: jvp_in_float64(swiglu, (x,), (tangent,)),
    ),
    Operator(
        "rms_norm_jvp",
        MATRICES,
        (7, 96),
        lambda random, shape: (random(shape), random(shape), random(shape[-1:]), 1e-5),
        plain,
        of_reference("rms_norm_jvp"),
        exact_rms_norm,
    ),
    Operator(
        "flash_attention_jvp",
        HEADS,
        (1, 2, 1, 33, 64),
        attention_arguments,
        plain,
        attention_jvp,
        attention_jvp_float64,
        distributions=(normal,),  # scores of 30 and more select one key, whose rounding decides all
    ),
    Operator(
        "attention_stats",
        HEADS,
        (1, 2, 1, 33, 64),
        stats_arguments,
        plain,
        of_reference("attention_stats"),
        reference_in_float64("attention_stats"),
        distributions=(normal,),
    ),
    Operator(
        "probe_moments",
        ((1, 1, 59), (3, 5, 96), (2, 97, 1120), (1, 1025, 123), (4, 9, 8192)),
        (2, 7, 96),
        lambda random, shape: (random((shape[0], shape[2])), random(shape)),
        probe,
        of_reference("probe_moments", probe),
        exact_probe,
    ),
    Operator(
        "count_below",
        MATRICES,
        (7, 96),
        count_arguments,
        plain,
        of_reference("count_below"),
        reference_in_float64("count_below"),
    ),
)
