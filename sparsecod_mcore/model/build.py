"""A model from its arguments alone, outside of a training run: no optimizer, no pipeline, to be evaluated."""

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from sparsecod_mcore import platform
from sparsecod_mcore.config import build_parser
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.model.spec import use_measured_spec

# How a model was trained, as opposed to what it is.
_EVALUATION: dict[str, Any] = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "overlap_moe_expert_parallel_comm": False,
    "delay_wgrad_compute": False,
    "cuda_graph_impl": "none",
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "mtp_num_layers": None,
    "perform_initialization": False,
    "use_cpu_initialization": False,
    "fp8": None,
    "fp4": None,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "deterministic_mode": False,
    "cpu_offloading_num_layers": 0,
    "yaml_cfg": None,
}


def complete_arguments(settings: Mapping[str, Any], dtype: torch.dtype) -> Namespace:
    """Megatron's arguments for `settings`, by destination, its defaults for others, and `dtype` for weights."""
    args = build_parser().parse_args([])
    vars(args).update(settings)
    args.params_dtype = dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    return args


def evaluation_arguments(settings: Mapping[str, Any], dtype: torch.dtype) -> Namespace:
    """`complete_arguments` with this process's layout."""
    args = complete_arguments(settings, dtype)
    vars(args).update(_EVALUATION)
    args.tensor_model_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    args.expert_model_parallel_size = parallel_state.get_expert_model_parallel_world_size()
    args.expert_tensor_parallel_size = parallel_state.get_expert_tensor_parallel_world_size()
    if not platform.has_transformer_engine():
        vars(args).update(platform.LOCAL_DEFAULTS)
    return args


def describe_model(args: Namespace, *, training: bool = False) -> GPTModelConfig:
    """What Megatron builds the model from, with this project's layers.

    Left to itself, Megatron's training passes over its own ``--rope-scaling-factor``.
    """
    model_config = gpt_config_from_args(args)
    use_measured_spec(model_config, args, training=training)
    model_config.rope_scaling_factor = args.rope_scaling_factor
    return model_config


def build_model(args: Namespace) -> GPTModel:
    """A model in evaluation mode whose weights are yet to be loaded. Raises `UserError` if it cannot be cut so."""
    tensor, expert = args.tensor_model_parallel_size, args.expert_model_parallel_size
    whole = {"num_attention_heads": args.num_attention_heads, "vocabulary": args.padded_vocab_size}
    if args.group_query_attention and args.num_query_groups:
        whole["num_query_groups"] = args.num_query_groups
    for name, value in whole.items():
        if value % tensor:
            raise UserError(f"{name} {value} is not divisible by tensor parallel size {tensor}")
    if args.num_experts and args.num_experts % expert:
        raise UserError(f"num_experts {args.num_experts} is not divisible by expert parallel size {expert}")
    model_config = describe_model(args)
    # Says of every GPTModel that another class is to come; Megatron's version is pinned.
    logging.getLogger(GPTModel.__module__).setLevel(logging.ERROR)
    try:
        model_config.finalize()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = GPTModelBuilder(model_config).build_model(groups, pre_process=True, post_process=True)
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses this model: {' '.join(str(error).split())}") from error
    return model.eval().requires_grad_(False)
