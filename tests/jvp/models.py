"""Small random Megatron models, in one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsecod_mcore import platform

platform.prepare()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training.models.gpt import GPTModelConfig  # noqa: E402

from sparsecod_mcore.model.depth_control import DepthControl  # noqa: E402
from sparsecod_mcore.model.spec import measured_spec  # noqa: E402

GQA = {"num_query_groups": 2}
MQA = {"num_query_groups": 1}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
SHARED_EXPERT = {"moe_shared_expert_intermediate_size": 20}


@contextmanager
def one_process() -> Iterator[None]:
    """Megatron's process groups for a job of one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def random_model(
    dtype: torch.dtype = torch.float64,
    width: int = 16,
    layers: int = 1,
    full_width_qk_norm: bool = False,
    control: DepthControl | None = None,
    **overrides: Any,
) -> GPTModel:
    """A model whose branches are large enough to bend what passes through them; call inside `one_process`."""
    settings: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": width,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "transformer_impl": "local",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.4,
        "output_layer_init_method": torch.nn.init.normal_,
    }
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(**(settings | overrides))
    described = GPTModelConfig(transformer=config, vocab_size=64)
    spec = measured_spec(described, control=control, full_width_qk_norm=full_width_qk_norm)
    model = GPTModel(config, spec, vocab_size=64, max_sequence_length=64, position_embedding_type="rope")
    for name, parameter in model.named_parameters():
        if "norm" in name:  # also those of residual adds
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).train()
