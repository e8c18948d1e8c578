"""The sizes at which the paper's questions are asked again: micro for a CPU, small for one GPU."""

from dataclasses import dataclass
from typing import Any

from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.experiments.runs import Shape

SEEDS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the runs of all questions have in common at one size; the baseline is `layers` deep and dense."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    depths: tuple[int, ...]
    lengths: tuple[int, ...]
    kv_heads: tuple[int, ...]
    kv_tokens: tuple[float, ...]  # relative, for equal FLOPs
    experts: int
    top_k: int
    expert_ffn: int  # top_k of them have the parameters of the dense MLP
    deep: Shape  # of the ladder: deeper than the baseline, and as large
    deep_moe: Shape  # as many active parameters
    vocabulary: int
    seq_length: int
    global_batch: int
    micro_batch: int
    tokens: float
    eval_tokens: int
    lr: float
    warmup_steps: int
    scored_sequences: int
    rest: dict[str, Any]


_REST: dict[str, Any] = {
    "make_vocab_size_divisible_by": 128,
    "log_interval": 50,
    "eval_interval": 1_000_000,  # once, at the end
    "num_workers": 0,
    "seed": 1,
    "cod.stats_interval": 5,
    "cod.kurtosis_interval": 0,
    "cod.jacobian_interval": 0,
}

MICRO = Size(
    name="micro",
    layers=8, hidden=64, ffn=192, heads=8,
    depths=(4, 8, 16), lengths=(64, 256, 1024), kv_heads=(8, 2, 1), kv_tokens=(1.0, 1.0968, 1.1148),
    experts=8, top_k=2, expert_ffn=96,
    deep=Shape(layers=16, hidden=48, ffn=128, heads=8, kv_heads=8),
    deep_moe=Shape(layers=16, hidden=48, ffn=72, heads=8, kv_heads=2, experts=8, top_k=2),
    vocabulary=1024, seq_length=128, global_batch=8, micro_batch=8,
    tokens=0.5e6, eval_tokens=65_536, lr=4e-3, warmup_steps=50, scored_sequences=16,
    rest=_REST | {"vocab_size": 1024, "init_method_std": 0.06, "save_interval": 500},
)  # fmt: skip

SMALL = Size(
    name="small",
    layers=12, hidden=512, ffn=1536, heads=8,
    depths=(6, 12, 24), lengths=(256, 1024, 4096), kv_heads=(8, 2, 1), kv_tokens=(1.0, 1.1084, 1.1288),
    experts=16, top_k=4, expert_ffn=384,
    deep=Shape(layers=24, hidden=384, ffn=1024, heads=8, kv_heads=8),
    deep_moe=Shape(layers=24, hidden=384, ffn=288, heads=8, kv_heads=2, experts=16, top_k=4),
    vocabulary=8192, seq_length=512, global_batch=64, micro_batch=16,
    tokens=200e6, eval_tokens=2_097_152, lr=1e-3, warmup_steps=200, scored_sequences=64,
    rest=_REST | {"vocab_size": 8192, "init_method_std": 0.02, "bf16": True, "save_interval": 1000},
)  # fmt: skip

SIZES = {size.name: size for size in (MICRO, SMALL)}


def size_of(name: str) -> Size:
    """The size called `name`. Raises `UserError` for another."""
    if name not in SIZES:
        raise UserError(f"size {name} is given, {' or '.join(SIZES)} is accepted{nearest(name, SIZES)}")
    return SIZES[name]
