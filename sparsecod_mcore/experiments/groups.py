"""Which GPUs talk to each other: Megatron's process groups for a layout, and how each lies on nodes.

Megatron counts ranks as tensor, context, data, pipeline, the first fastest (`--use-tp-pp-dp-mapping` is refused in
estimates); experts as expert tensor, expert, expert data, pipeline. Nodes are filled rank by rank.
"""

from argparse import Namespace
from dataclasses import dataclass

from sparsecod_mcore.errors import UserError


@dataclass(frozen=True)
class Group:
    """Ranks that take part in a collective. `in_node` of them share a node, on every node alike."""

    name: str
    size: int
    in_node: int

    @property
    def nodes(self) -> int:
        return -(-self.size // self.in_node)


@dataclass(frozen=True)
class Groups:
    """Those of one rank."""

    world: Group
    everyone: Group  # of the same ranks as the world: the distributed optimizer's
    stage: Group  # the ranks of one pipeline stage
    tensor: Group
    context: Group
    tensor_context: Group
    data: Group  # whose gradients are added up: data and context parallel
    pipeline: Group
    model: Group  # tensor and pipeline parallel
    ends: Group  # the first and the last pipeline stage
    expert: Group
    expert_tensor: Group
    tensor_expert: Group
    expert_data: Group
    expert_model: Group  # expert tensor, expert and pipeline parallel


def groups_of(args: Namespace, per_node: int) -> Groups:
    """The groups of validated `args`, `per_node` GPUs to a node.

    Raises `UserError` for orders of ranks that are not known here.
    """
    if args.use_tp_pp_dp_mapping:
        raise UserError("use_tp_pp_dp_mapping is given; communication is modelled for tensor, context, data, pipeline")
    tensor, context, pipeline = (
        args.tensor_model_parallel_size,
        args.context_parallel_size,
        args.pipeline_model_parallel_size,
    )
    world, data = args.world_size, args.data_parallel_size
    expert_tensor = args.expert_tensor_parallel_size or tensor
    expert = args.expert_model_parallel_size
    stage = world // pipeline
    of_experts = expert_tensor * expert

    def strided(name: str, size: int, stride: int) -> Group:
        return Group(name, size, max(1, min(size, per_node // stride)))

    across = strided("pipeline", pipeline, stage)
    return Groups(
        world=strided("world", world, 1),
        everyone=strided("everyone", world, 1),
        stage=strided("stage", stage, 1),
        tensor=strided("tensor", tensor, 1),
        context=strided("context", context, tensor),
        tensor_context=strided("tensor_context", tensor * context, 1),
        data=strided("data", data * context, tensor),
        pipeline=across,
        model=Group("model", tensor * pipeline, min(tensor, per_node) * across.in_node),
        ends=strided("ends", min(2, pipeline), stage * max(1, pipeline - 1)),
        expert=strided("expert", expert, expert_tensor),
        expert_tensor=strided("expert_tensor", expert_tensor, 1),
        tensor_expert=strided("tensor_expert", of_experts, 1),
        expert_data=strided("expert_data", stage // of_experts, of_experts),
        expert_model=Group("expert_model", of_experts * pipeline, min(of_experts, per_node) * across.in_node),
    )
