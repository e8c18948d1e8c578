"""DeepNorm's initialisation: what a layer writes to the stream starts smaller (DeepNet, Wang et al. 2022)."""

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

from sparsecod_mcore.model.depth_control import deepnorm_beta


@torch.no_grad()
def scale_initial_weights(model_chunks: list[MegatronModule]) -> list[MegatronModule]:
    """Multiply by beta the weights of values, attention's output projection and the MLP or experts, on every rank.

    A hook of Megatron's for a model that was just built: returns it.
    """
    for chunk in model_chunks:
        for layer in chunk.decoder.layers:
            beta = deepnorm_beta(layer.config.num_layers)
            attention = layer.self_attention
            attention.linear_qkv.weight[value_rows(attention)] *= beta
            attention.linear_proj.weight *= beta
            for name, weight in layer.mlp.named_parameters():
                if "linear_fc" in name and weight.dim() > 1:  # neither routers, nor gates, nor biases
                    weight *= beta
    return model_chunks


def value_rows(attention: SelfAttention) -> torch.Tensor:
    """Which rows [E] of this rank's part of `linear_qkv` are of values, as a mask.

    A query group's queries, key and value lie side by side, and groups are dealt out in order, also where a rank has
    but a part of one.
    """
    config, weight_ED = attention.config, attention.linear_qkv.weight
    groups, width = config.num_query_groups, attention.hidden_size_per_attention_head
    rows_of_group = (config.num_attention_heads // groups + 2) * width
    rows_E = torch.arange(len(weight_ED), device=weight_ED.device) + attention.pg_collection.tp.rank() * len(weight_ED)
    return rows_E % rows_of_group >= rows_of_group - width
