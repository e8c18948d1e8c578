"""Memory of one GPU: weights and optimizer as Megatron counts them, activations of this project's layers.

Megatron's estimate of activations is that of a dense GPT with GELU and unfused attention. These models have SwiGLU
(which keeps two halves and their product), grouped queries, experts (a token's row once per expert it is sent to),
fused attention (no T x T) and context parallelism: so it is counted here, tensor by tensor. It is an estimate: of what
allocators waste and libraries keep, only `OVERHEAD` is known.
"""

from argparse import Namespace
from copy import copy
from dataclasses import dataclass

from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

OVERHEAD = 4e9  # bytes of CUDA context, communication buffers and fragmentation: a guess
_LOGIT_BYTES = 6  # bfloat16 logits, and float32 ones that the loss is computed in
_MEGATRON_BYTES = 18  # of a parameter in its formula: bfloat16 weights, all else in float32
_FLOAT32_BYTES = 16  # weights, gradients and two moments


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, which is of the first pipeline stage."""

    weights_and_optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights_and_optimizer + self.activations + OVERHEAD


def estimate_memory(args: Namespace) -> Memory:
    """On the fullest GPU of a job laid out as validated `args` (or `layouts.with_layout`) say."""
    return Memory(weights_and_optimizer=_weights_and_optimizer(args), activations=_activations(args))


def _weights_and_optimizer(args: Namespace) -> float:
    """Megatron's figure, but that the distributed optimizer spreads its state over context-parallel ranks as well."""
    args = copy(args)
    args.data_parallel_size *= args.context_parallel_size
    size = compute_weight_and_optimizer_memory(args)
    if args.bf16 or args.fp16 or args.use_distributed_optimizer:
        return size
    return size * _FLOAT32_BYTES / _MEGATRON_BYTES


def _activations(args: Namespace) -> float:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    tokens = args.micro_batch_size * args.seq_length / args.context_parallel_size
    element = 2 if args.bf16 or args.fp16 else 4
    layers = args.num_layers / pipeline
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    in_flight = min(pipeline, micro_batches)
    layer = tokens * _layer_bytes_per_token(args, element)
    if args.recompute_granularity == "full":  # every layer keeps its input; the one at work all
        kept = layers * tokens * args.hidden_size * element / (tensor if args.sequence_parallel else 1)
        kept = kept * in_flight + layer
    else:
        kept = layers * layer * in_flight
    if pipeline == 1:
        kept += tokens * (_LOGIT_BYTES * args.padded_vocab_size / tensor + args.hidden_size * element)
    return kept


def _layer_bytes_per_token(args: Namespace, element: int) -> float:
    """What one layer keeps of one token for the backward pass."""
    tensor, width = args.tensor_model_parallel_size, args.hidden_size
    query, group = args.kv_channels * args.num_attention_heads, args.kv_channels * args.num_query_groups
    residual = 4 * width / (tensor if args.sequence_parallel else 1)  # inputs of two norms, and their outputs
    attention = 2 * query + 2 * group  # queries, keys, values, context
    if args.num_experts is None:
        mlp = 3 * args.ffn_hidden_size  # both halves, and silu(a) b
    else:
        routed = args.moe_router_topk * (2 * width + 3 * args.moe_ffn_hidden_size)  # and rows sent and brought back
        mlp = routed + 3 * (args.moe_shared_expert_intermediate_size or 0) + 2 * args.num_experts
    scores = 0.0
    if args.kv_channels % 8:  # unfused: scores and probabilities
        scores = 2 * args.num_attention_heads * args.seq_length
    return element * (residual + (attention + mlp + scores) / tensor)
