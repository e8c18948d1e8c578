"""Ranks that score: tensor- and expert-parallel ranks hold one model together, data-parallel ones share the work.

A worker is one copy of the model: its ranks do the same things in the same order. With experts spread over ranks
that would hold different tokens in training, those ranks work on the same tokens here.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from sparsecod_mcore import platform
from sparsecod_mcore.errors import UserError

# While others wait for it, one rank hashes the files of a large model, or runs units that take longer than the others'.
TIMEOUT = timedelta(hours=12)


def initialise(tensor: int = 1, expert: int = 1, seed: int = 1234) -> None:
    """Join the ranks that torchrun started, or be the only one, and split them into workers."""
    if not dist.is_initialized():
        backend = "nccl" if platform.has_gpu() else "gloo"
        if "RANK" in os.environ:
            if platform.has_gpu():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    if tensor < 1 or expert < 1 or world % (tensor * expert):
        raise UserError(
            f"{world} processes are not divisible by tensor x expert parallel size {tensor} x {expert}; "
            "pipeline and context parallelism are not used for scoring"
        )
    if parallel_state.model_parallel_is_initialized():
        assert parallel_state.get_tensor_model_parallel_world_size() == tensor
        assert parallel_state.get_expert_model_parallel_world_size() == expert
        return
    minutes = int(TIMEOUT.total_seconds() // 60)
    parallel_state.initialize_model_parallel(
        tensor, expert_model_parallel_size=expert, distributed_timeout_minutes=minutes
    )
    model_parallel_cuda_manual_seed(seed)


def worker() -> int:
    """Which worker this rank belongs to."""
    return parallel_state.get_expert_data_parallel_rank()


def workers() -> int:
    """How many copies of the model there are."""
    return parallel_state.get_expert_data_parallel_world_size()


def is_first_of_worker() -> bool:
    """Whether this rank speaks for its worker."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_expert_model_parallel_rank() == 0


def is_first() -> bool:
    """Whether this rank speaks for all."""
    return dist.get_rank() == 0


def sum_over_workers(tensor: torch.Tensor) -> None:
    """Make `tensor` the sum of all workers'. Collective."""
    if workers() > 1:
        dist.all_reduce(tensor, group=parallel_state.get_expert_data_parallel_group())


def gather_from_workers[T](item: T) -> list[T]:
    """Every worker's `item`, in their order. Collective."""
    if workers() == 1:
        return [item]
    items: list[Any] = [None] * workers()
    dist.all_gather_object(items, item, group=parallel_state.get_expert_data_parallel_group())
    return items


def gather_at[T](receiver: int, item: T) -> list[T] | None:
    """Every worker's `item`, in their order, at the worker `receiver`; None at the others. Collective."""
    if workers() == 1:
        return [item]
    items: list[Any] | None = [None] * workers() if worker() == receiver else None
    dist.gather_object(item, items, group=parallel_state.get_expert_data_parallel_group(), group_dst=receiver)
    return items


def from_worker[T](sender: int, item: T | None) -> T:
    """What the worker `sender` gives as `item`, at every worker. Collective."""
    items: list[Any] = [item]
    if workers() > 1:
        dist.broadcast_object_list(items, group=parallel_state.get_expert_data_parallel_group(), group_src=sender)
    return items[0]


def from_first[T](make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, on every rank. Collective; a `UserError` of it is raised on all."""
    answer: list[Any] = [None]
    if is_first():
        try:
            answer[0] = make()
        except UserError as error:
            answer[0] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]
