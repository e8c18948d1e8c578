"""One training job whose collectives are counted: run under torchrun by benchmarks/communication.py and by tests.

    torchrun ... benchmarks/recorded_training.py OUT FIRST LAST [any flag of training]

Every call that reaches a process group from Python is seen, whoever makes it: the methods of torch's ProcessGroup are
replaced, below torch.distributed's functions and Megatron's names for them. Counted are the calls of steps FIRST to
LAST, with all that happens between those steps; OUT/rank-N.json has them, and the seconds of every step. With
Megatron's --fake-process-group, and RANK and WORLD_SIZE set, one process is any rank of a job of any size: it makes all
calls, and they do nothing.
"""

import functools
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # where nothing is installed

from sparsecod_mcore import platform

platform.prepare()  # before anything imports Megatron

from megatron.core import parallel_state  # noqa: E402

from sparsecod_mcore.monitor.monitor import Monitor  # noqa: E402
from sparsecod_mcore.train import pretrain  # noqa: E402
from sparsecod_mcore.train.hooks import TrainingHooks  # noqa: E402
from sparsecod_mcore.train.probing import JacobianProbes  # noqa: E402

# Methods of a process group: the operation, and which argument is its whole buffer.
METHODS: dict[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "send": ("send", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "barrier": ("barrier", -1),  # counts as one byte
}


class Recorder:
    """Counts calls by (who makes them, operation, group, bytes of the whole buffer)."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str, str, int]] = Counter()
        self.counting = False
        self._who = "training"
        for name, (operation, argument) in METHODS.items():
            original = getattr(dist.ProcessGroup, name)
            setattr(dist.ProcessGroup, name, self._counted(original, operation, argument))

    def _counted(self, original: Callable[..., Any], operation: str, argument: int) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if self.counting and group.size() > 1:
                size = 1 if argument < 0 else _bytes((args or tuple(kwargs.values()))[argument])
                # With two stages Megatron sends the other way through the group of all ranks.
                name = "pipeline" if operation == "send" else group_name(group)
                self.calls[self._who, operation, name, size] += 1
            return original(group, *args, **kwargs)

        return call

    @contextmanager
    def on_behalf_of(self, who: str) -> Iterator[None]:
        """Attribute calls to `who`."""
        before, self._who = self._who, who
        yield
        self._who = before

    def attribute(self, owner: type, method: str, who: str) -> None:
        """Attribute the calls that `method` makes to `who`."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.on_behalf_of(who):
                return original(*args, **kwargs)

        setattr(owner, method, call)


def _bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(_bytes, tensors))


def group_name(group: dist.ProcessGroup) -> str:
    """As `experiments.groups` calls it; ranks may be the same in several groups, so the object tells."""
    of_experts = parallel_state.get_expert_tensor_model_pipeline_parallel_group
    known = (
        ("world", dist.group.WORLD),
        ("everyone", parallel_state.get_intra_distributed_optimizer_instance_group()),
        ("stage", parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)),
        ("tensor", parallel_state.get_tensor_model_parallel_group()),
        ("context", parallel_state.get_context_parallel_group()),
        ("tensor_context", parallel_state.get_tensor_and_context_parallel_group()),
        ("data", parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ("pipeline", parallel_state.get_pipeline_model_parallel_group()),
        ("model", parallel_state.get_model_parallel_group()),
        ("ends", parallel_state.get_embedding_group(check_initialized=False)),
        ("expert", parallel_state.get_expert_model_parallel_group()),
        ("expert_tensor", parallel_state.get_expert_tensor_parallel_group()),
        ("tensor_expert", parallel_state.get_expert_tensor_and_model_parallel_group()),
        ("expert_data", parallel_state.get_expert_data_parallel_group()),
        ("expert_model", of_experts()),
        ("expert_model", of_experts(with_egtp_remat=True)),
    )
    found = next((name for name, one in known if one is group), None)
    return found or f"ranks {dist.get_process_group_ranks(group)}"


class RecordedHooks(TrainingHooks):
    """Training as it is, with a look at the clock before every step."""

    recorder: Recorder
    first: int
    last: int
    out: Path
    began: list[float]

    def train_step(self, original: Callable[..., Any], *args: Any, iteration: int, **kwargs: Any) -> Any:
        step = iteration + 1
        if step in (self.first, self.last + 1):
            self.recorder.counting = step == self.first
        self.began.append(time.perf_counter())
        if step == self.last + 1 and self.args.fake_process_group:
            self.leave()
            os._exit(0)  # no checkpoint can be saved among ranks that do not exist
        return super().train_step(original, *args, iteration=iteration, **kwargs)

    @classmethod
    def leave(cls) -> None:
        """Write what was counted."""
        seconds = [after - before for before, after in itertools.pairwise(cls.began)]
        calls = [[*key, count] for key, count in sorted(cls.recorder.calls.items())]
        rank = os.environ.get("RANK", "0")  # process groups may be gone by now
        (cls.out / f"rank-{rank}.json").write_text(json.dumps({"seconds": seconds, "calls": calls}))


def receive_zeros() -> None:
    """What fake groups never receive is to be finite numbers."""
    torch.empty = torch.zeros  # type: ignore[assignment]
    torch.empty_like = torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]


def main() -> None:
    out, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if "--fake-process-group" in sys.argv:
        receive_zeros()
    recorder = Recorder()
    recorder.attribute(Monitor, "collect", "statistics")
    recorder.attribute(JacobianProbes, "collect", "probes")
    recorder.attribute(JacobianProbes, "_after_layer", "probes")
    RecordedHooks.recorder, RecordedHooks.first, RecordedHooks.last = recorder, first, last
    RecordedHooks.out, RecordedHooks.began = out, []
    pretrain.TrainingHooks = RecordedHooks  # type: ignore[misc]
    pretrain.main(sys.argv[4:])
    RecordedHooks.leave()


if __name__ == "__main__":
    main()
