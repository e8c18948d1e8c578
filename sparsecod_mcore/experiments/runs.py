"""A run as an experiment's table states it, and as the configuration that it becomes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of every model of the paper (appendix C): Llama's architecture. Megatron decays matrices only, as the paper does.
_ARCHITECTURE: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
_OPTIMIZER: dict[str, Any] = {
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "lr_decay_style": "cosine",
}
_LOWEST_LR = 0.1  # of the highest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder. With experts, `ffn` is the width of one; a shared expert is as wide as `shared_experts` of them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    experts: int = 0
    top_k: int = 0
    shared_experts: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained; `tokens` is rounded to whole steps. Sizes are of sequences, lengths in tokens."""

    seq_length: int
    max_positions: int
    tokens: float
    global_batch: int
    micro_batch: int
    weight_decay: float
    lr: float
    warmup_steps: int
    eval_tokens: int

    @property
    def tokens_per_step(self) -> int:
        return self.seq_length * self.global_batch

    @property
    def steps(self) -> int:
        return round(self.tokens / self.tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the paper says a model's size is, in the digits it gives; None where it says nothing."""

    total: str | None = None  # parameters with one of the two embeddings, such as "1.2B"
    active: str | None = None  # likewise, of those that one token uses


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an experiment: what differs from other runs, and `rest`, what all of its size share."""

    name: str
    group: str
    says: str  # what it is, for the head of its file
    shape: Shape
    recipe: Recipe
    rest: Mapping[str, Any]
    published: Published = Published()
    overrides: Mapping[str, Any] | None = None


def settings_of(run: Run) -> dict[str, Any]:
    """The run's configuration by key, with this project's keys prefixed ``cod.`` as `config.read_config` has them."""
    shape, recipe = run.shape, run.recipe
    settings: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.heads,
    }
    if shape.kv_heads != shape.heads:
        settings |= {"group_query_attention": True, "num_query_groups": shape.kv_heads}
    if shape.experts:
        settings |= _experts(shape)
    settings |= {"seq_length": recipe.seq_length, "max_position_embeddings": recipe.max_positions}
    settings |= _ARCHITECTURE
    settings |= {
        "micro_batch_size": recipe.micro_batch,
        "global_batch_size": recipe.global_batch,
        "train_iters": recipe.steps,
        "lr": recipe.lr,
        "min_lr": round(recipe.lr * _LOWEST_LR, 12),
        "lr_warmup_iters": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
    }
    evaluation = {"eval_iters": max(1, round(recipe.eval_tokens / recipe.tokens_per_step))}
    return settings | _OPTIMIZER | evaluation | dict(run.rest) | dict(run.overrides or {})


def _experts(shape: Shape) -> dict[str, Any]:
    """A mixture without capacity limits: every token reaches its experts (appendix C.5)."""
    settings: dict[str, Any] = {
        "num_experts": shape.experts,
        "moe_ffn_hidden_size": shape.ffn,
        "moe_router_topk": shape.top_k,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.001,
        "moe_token_dispatcher_type": "alltoall",
    }
    if shape.shared_experts:
        settings["moe_shared_expert_intermediate_size"] = shape.shared_experts * shape.ffn
    return settings
