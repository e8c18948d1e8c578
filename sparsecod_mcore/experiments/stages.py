"""One GPU's part of a model: what its pipeline stage holds, and the sizes that its collectives are made from."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.experiments.buckets import Parameter
from sparsecod_mcore.experiments.groups import Groups, groups_of


@dataclass(frozen=True, eq=False)
class Stage:
    """One pipeline stage of validated `args`, and sizes that its collectives are made from; equal to itself alone."""

    args: Namespace
    number: int
    groups: Groups

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.args.pipeline_model_parallel_size - 1

    @property
    def layers(self) -> int:
        return self.args.num_layers // self.args.pipeline_model_parallel_size

    @property
    def moe_layers(self) -> int:
        """Of those, the ones with experts."""
        return sum(self._has_experts(layer) for chunk in range(self.chunks) for layer in self._layers_of(chunk))

    def _has_experts(self, layer: int) -> bool:
        frequency = self.args.moe_layer_freq
        if self.args.num_experts is None:
            return False
        return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])

    def _layers_of(self, chunk: int) -> range:
        """Numbers of the layers of one of the chunks, which are dealt out to stages in turn."""
        length = self.layers // self.chunks
        start = chunk * self.args.num_layers // self.chunks + self.number * length
        return range(start, start + length)

    @property
    def chunks(self) -> int:
        """Parts of the model that a GPU holds, with virtual pipeline stages."""
        return self.args.virtual_pipeline_model_parallel_size or 1

    @property
    def tokens(self) -> float:
        """T."""
        return self.args.micro_batch_size * self.args.seq_length / self.args.context_parallel_size

    @property
    def element(self) -> int:
        """Bytes of an activation or a parameter."""
        return 2 if self.args.bf16 or self.args.fp16 else 4

    @property
    def gradient(self) -> int:
        """Bytes of a gradient where ranks add gradients up."""
        return 4 if self.args.accumulate_allreduce_grads_in_fp32 else self.element

    @property
    def heads_width(self) -> int:
        """Q + 2 G: what the projection to queries, keys and values puts out."""
        args = self.args
        return int(args.kv_channels * (args.num_attention_heads + 2 * args.num_query_groups))

    @property
    def activation(self) -> float:
        """Bytes of hidden states, T H."""
        return self.tokens * self.args.hidden_size * self.element

    @property
    def forwards(self) -> int:
        """Forward passes of a layer for one backward pass."""
        return 2 if self.args.recompute_granularity == "full" else 1

    @property
    def micro_batches(self) -> int:
        return int(self.args.global_batch_size // (self.args.micro_batch_size * self.args.data_parallel_size))

    def parameters(self, chunk: int) -> Iterator[Parameter]:
        """Those of one of the chunks that this GPU holds, in the order of Megatron's modules."""
        args, tensor, width = self.args, self.args.tensor_model_parallel_size, self.args.hidden_size
        embedding = args.padded_vocab_size * width / tensor
        norm = Parameter(width * (1 if args.normalization == "RMSNorm" else 2))
        tied = not args.untie_embeddings_and_output_weights

        def mlp(inner: int, ranks: int, expert: bool = False) -> tuple[Parameter, Parameter]:
            second = width * inner / ranks
            return Parameter((2 if args.swiglu else 1) * second, expert), Parameter(second, expert)

        if self.first and chunk == 0:
            yield Parameter(embedding, shared=tied and not self.last)
        for layer in self._layers_of(chunk):
            yield norm
            yield Parameter(width * args.kv_channels * args.num_attention_heads / tensor)
            yield Parameter(width * self.heads_width / tensor)
            yield norm
            if not self._has_experts(layer):
                yield from mlp(args.ffn_hidden_size, tensor)
                continue
            yield Parameter(width * args.num_experts)  # the router
            experts = [mlp(args.moe_ffn_hidden_size, self.groups.expert_tensor.size, expert=True)]
            experts *= args.num_experts // self.groups.expert.size
            yield from chain.from_iterable(zip(*experts, strict=True) if args.moe_grouped_gemm else experts)
            if args.moe_shared_expert_intermediate_size:
                yield from mlp(args.moe_shared_expert_intermediate_size, tensor)
        if self.last and chunk == self.chunks - 1:
            yield norm
            if not (tied and self.first):
                yield Parameter(embedding, shared=tied)

    @property
    def dense_parameters(self) -> float:
        """Elements that this GPU holds, without experts'."""
        return self._elements(of_experts=False)

    @property
    def expert_parameters(self) -> float:
        """Elements that this GPU holds of experts."""
        return self._elements(of_experts=True)

    def _elements(self, *, of_experts: bool) -> float:
        held = chain.from_iterable(map(self.parameters, range(self.chunks)))
        return sum(parameter.size for parameter in held if parameter.expert == of_experts)

    @property
    def norm_parameters(self) -> int:
        width = self.args.hidden_size * (1 if self.args.normalization == "RMSNorm" else 2)
        return int((2 * self.layers + self.last) * width)


def stages_of(args: Namespace, per_node: int) -> list[Stage]:
    """Every pipeline stage of validated `args`, `per_node` GPUs to a node.

    Raises `UserError` for what is not modelled.
    """
    uneven = [
        name
        for name in (
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "pipeline_model_parallel_layout",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
        )
        if getattr(args, name, None)
    ]
    if uneven or args.num_layers % args.pipeline_model_parallel_size:
        given = ", ".join(uneven) or f"{args.num_layers} layers in {args.pipeline_model_parallel_size}"
        raise UserError(f"communication is modelled for pipeline stages of equal layers, not {given}")
    for name, concerned, modelled in (
        ("moe_token_dispatcher_type", args.num_experts is not None, "alltoall"),
        ("cp_comm_type", args.context_parallel_size > 1, "p2p"),
        ("recompute_method", args.recompute_granularity == "full", "uniform"),
        ("num_distributed_optimizer_instances", True, "1"),
    ):
        value = getattr(args, name)
        given = " ".join(dict.fromkeys(value)) if isinstance(value, list) else str(value)
        if concerned and given != modelled:
            raise UserError(f"{name} {given} is given; communication is modelled for {modelled}")
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name):
            raise UserError(f"{name} is given; communication is not modelled with it")
    groups = groups_of(args, per_node)
    return [Stage(args, number, groups) for number in range(args.pipeline_model_parallel_size)]
