"""Parameters of a model, by part.

Megatron counts a whole model too (theoretical_memory_usage), but gives the number as bytes only; tests hold both, and
models built on the meta device, against this.
"""

from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameters:
    """Counts by part, over all layers. Of experts, `experts` are all and `active_experts` those one token uses."""

    embedding: int
    output: int
    attention: int
    mlp: int
    shared_experts: int
    experts: int
    active_experts: int
    router: int
    norms: int

    @property
    def total(self) -> int:
        return self._beside_experts + self.experts

    @property
    def active(self) -> int:
        """Of one token."""
        return self._beside_experts + self.active_experts

    @property
    def published_total(self) -> int:
        """As the paper counts: one of the two embedding matrices."""
        return self.total - self.output

    @property
    def published_active(self) -> int:
        return self.active - self.output

    @property
    def _beside_experts(self) -> int:
        return self.embedding + self.output + self.attention + self.mlp + self.shared_experts + self.router + self.norms


def moe_layers(args: Namespace) -> int:
    """How many layers have experts."""
    if args.num_experts is None:
        return 0
    if isinstance(args.moe_layer_freq, int):
        return len(range(0, args.num_layers, args.moe_layer_freq))
    return sum(args.moe_layer_freq)


def count_parameters(args: Namespace) -> Parameters:
    """Count the parameters that validated `args` (`planned_arguments`) describe, over all ranks, each once."""
    width, layers, with_experts = args.hidden_size, args.num_layers, moe_layers(args)
    matrices = 3 if args.swiglu else 2
    query = args.kv_channels * args.num_attention_heads
    key_and_value = 2 * args.kv_channels * args.num_query_groups
    embedding = args.padded_vocab_size * width
    expert = matrices * width * (args.moe_ffn_hidden_size or 0)
    norm = width if args.normalization == "RMSNorm" else 2 * width
    return Parameters(
        embedding=embedding,
        output=embedding if args.untie_embeddings_and_output_weights else 0,
        attention=layers * width * (2 * query + key_and_value),
        mlp=(layers - with_experts) * matrices * width * args.ffn_hidden_size,
        shared_experts=with_experts * matrices * width * (args.moe_shared_expert_intermediate_size or 0),
        experts=with_experts * expert * (args.num_experts or 0),
        active_experts=with_experts * expert * args.moe_router_topk,
        router=with_experts * width * (args.num_experts or 0),
        norms=(2 * layers + 1) * norm,
    )
