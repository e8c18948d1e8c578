"""Weights of a decoder, in Megatron's checkpoints and in Hugging Face's files: what is merged, and split again.

Names and shapes of Megatron's are those of its torch_dist checkpoints: whole tensors, whatever the parallel layout.
Axes: V vocabulary, D hidden width, F width of the MLP, N query heads, G key and value heads, H head width, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

type Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of Megatron's and the tensors of Hugging Face's that it consists of."""

    names: tuple[str, ...]  # all are written, the first that is there is read; none: zeros, which Megatron does without
    shape: Shape
    tensors: tuple[str, ...]
    merge: Callable[..., torch.Tensor] = lambda tensor: tensor
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = lambda tensor: (tensor,)
    expert: tuple[int, int] | None = None  # which of how many, that checkpoints keep as one tensor [E, ...]
    padded: bool = False  # checkpoints may hold more rows, which no token of the vocabulary has

    def tensor_shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors of Hugging Face's."""
        parts = self.split(torch.empty(self.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.tensors, parts, strict=True)}


@dataclass(frozen=True)
class MixtureNames:
    """How a family calls the parts of a mixture of experts; `expert` holds the expert's number."""

    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def is_mixture(settings: Mapping[str, Any], layer: int) -> bool:
    """Whether `layer`, counted from 0, has experts (Megatron's --moe-layer-freq)."""
    frequency = settings["moe_layer_freq"] if settings.get("num_experts") else 0
    if isinstance(frequency, int):
        return frequency > 0 and layer % frequency == 0
    return bool(frequency[layer])


def decoder_weights(settings: Mapping[str, Any], names: MixtureNames) -> Iterator[Weight]:
    """Every weight of the model that Megatron's `settings` (arguments by destination) describe, in the model's order.

    A shared expert without a gate, which no family of Hugging Face has, is given one that is 1/2, and twice its output:
    the same function, exactly, for both are powers of 2.
    """
    vocabulary, width = settings["vocab_size"], settings["hidden_size"]
    embedding = (vocabulary, width)
    yield Weight(("embedding.word_embeddings.weight",), embedding, ("model.embed_tokens.weight",), padded=True)
    for layer in range(settings["num_layers"]):
        here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield from _attention(settings, f"{here}.self_attention", there)
        norm = (f"{there}.post_attention_layernorm.weight",)
        fused = f"{here}.mlp.linear_fc1.layer_norm_weight"
        if is_mixture(settings, layer):
            # The local spec has the first name, Transformer Engine's the second.
            yield Weight((fused, f"{here}.pre_mlp_layernorm.weight"), (width,), norm)
            yield from _mixture(settings, names, f"{here}.mlp", there)
        else:
            yield Weight((fused,), (width,), norm)
            parts = [f"{there}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
            yield from _mlp(f"{here}.mlp", parts, width, settings["ffn_hidden_size"])
    yield Weight(("decoder.final_layernorm.weight",), (width,), ("model.norm.weight",))
    if settings["untie_embeddings_and_output_weights"]:
        yield Weight(("output_layer.weight",), embedding, ("lm_head.weight",), padded=True)


def _attention(settings: Mapping[str, Any], here: str, layer: str) -> Iterator[Weight]:
    width, head = settings["hidden_size"], settings["kv_channels"]
    heads, groups = settings["num_attention_heads"], settings["num_query_groups"]
    rows = [heads * head, groups * head, groups * head]
    there = f"{layer}.self_attn"

    def interleave(*qkv: torch.Tensor) -> torch.Tensor:
        """Of each query group: its queries' rows, then its key's, then its value's."""
        return torch.cat([x.unflatten(0, (groups, -1)) for x in qkv], dim=1).flatten(0, 1)

    def separate(mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = mixed.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    yield Weight((f"{here}.linear_qkv.layer_norm_weight",), (width,), (f"{layer}.input_layernorm.weight",))
    for kind, shape in (("weight", (sum(rows), width)), ("bias", (sum(rows),))):
        if kind == "weight" or settings["add_qkv_bias"]:
            tensors = tuple(f"{there}.{name}_proj.{kind}" for name in "qkv")
            yield Weight((f"{here}.linear_qkv.{kind}",), shape, tensors, interleave, separate)
    if settings["qk_layernorm"]:
        whole = settings["cod_full_width_qk_norm"]
        for name, count in zip("qk", rows, strict=False):
            shape = (count if whole else head,)
            yield Weight((f"{here}.{name}_layernorm.weight",), shape, (f"{there}.{name}_norm.weight",))
    yield Weight((f"{here}.linear_proj.weight",), (width, rows[0]), (f"{there}.o_proj.weight",))


def _mlp(
    here: str, parts: list[str], width: int, inner: int, expert: tuple[int, int] | None = None
) -> Iterator[Weight]:
    """`parts` are the names of gate, up and down."""
    gate, up, down = parts
    yield Weight(
        (f"{here}.linear_fc1.weight",),
        (2 * inner, width),
        (gate, up),
        lambda gate_FD, up_FD: torch.cat((gate_FD, up_FD)),
        lambda both_FD: both_FD.chunk(2),
        expert,
    )
    yield Weight((f"{here}.linear_fc2.weight",), (width, inner), (down,), expert=expert)


def _mixture(settings: Mapping[str, Any], names: MixtureNames, here: str, layer: str) -> Iterator[Weight]:
    width, experts = settings["hidden_size"], settings["num_experts"]
    yield Weight((f"{here}.router.weight",), (experts, width), (f"{layer}.{names.router}.weight",))
    for number in range(experts):
        there = f"{layer}.{names.expert.format(number)}"
        parts = [f"{there}.{part}.weight" for part in (names.gate, names.up, names.down)]
        yield from _mlp(f"{here}.experts.experts", parts, width, settings["moe_ffn_hidden_size"], (number, experts))
    shared = settings["moe_shared_expert_intermediate_size"]
    if not shared:
        return
    parts = [f"{layer}.mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")]
    gate = f"{layer}.mlp.shared_expert_gate.weight"
    fc1, fc2 = _mlp(f"{here}.shared_experts", parts, width, shared)
    yield fc1
    if settings["moe_shared_expert_gate"]:
        yield fc2
        yield Weight((f"{here}.shared_experts.gate_weight",), (1, width), (gate,))
    else:
        yield Weight(fc2.names, fc2.shape, fc2.tensors, lambda down: down / 2, lambda down: (2 * down,))
        yield Weight((), (1, width), (gate,))
