"""Floating-point operations of training, as Megatron counts them.

That is what the training line's MFU is made from: forward and backward matrix products, attention causal (half of the
T x T) at the configured length, the experts that a token is sent to, the output layer on the padded vocabulary. Left
out are the embedding's look-up, norms, the router's product and what recomputation repeats.
"""

from argparse import Namespace
from copy import copy
from dataclasses import dataclass

from megatron.training.training import num_floating_point_operations


@dataclass(frozen=True)
class Flops:
    """Of training."""

    per_token: float
    attention_share: float  # of the products of queries, keys and values, which grow with the sequence length
    total: float  # of all steps


def count_flops(args: Namespace) -> Flops:
    """Of training as validated `args` say."""
    args = copy(args)  # Megatron fills in fields
    per_step = num_floating_point_operations(args, args.global_batch_size)
    without_attention = num_floating_point_operations(args, args.global_batch_size, seqlen_squared_sum_in_batch=0)
    return Flops(
        per_token=per_step / (args.global_batch_size * args.seq_length),
        attention_share=1 - without_attention / per_step,
        total=per_step * args.train_iters,
    )
