"""Mends of Megatron 0.19.2 that GPUs need as well, some of them where neither Transformer Engine nor Apex is."""

import functools
from pathlib import Path
from typing import Any

import torch


def use_prebuilt_index_helpers() -> None:
    """The wheel carries the dataset helpers built, without the Makefile that upstream would run to build them."""
    import megatron.core.datasets as datasets
    import megatron.training.initialize as initialize

    if not (Path(datasets.__file__).parent / "Makefile").exists():
        initialize._compile_dependencies = lambda: None


def resume_torch_adamw_in_distributed_optimizer() -> None:
    """torch's AdamW keeps ``step`` per parameter as a tensor; upstream expects it absent, shared, or in the group.

    Three mends: a state must exist before it can be described; each parameter needs its own ``step`` after loading
    (AdamW increments them in place, once per parameter); and ``step`` is no tensor of the parameter's shape.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    describe, load = optimizer_class.state_dict, optimizer_class.load_state_dict
    set_states = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(describe)
    def state_dict(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}
        return describe(self)

    @functools.wraps(load)
    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        load(self, state)
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()

    @functools.wraps(set_states)
    def set_states_without_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        parameter_state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = parameter_state.pop("step")
        with torch.no_grad():
            set_states(self, model_param, {name: value for name, value in tensors.items() if name != "step"})
        parameter_state["step"] = step

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states_without_step


def ask_at_once_for_signals() -> None:
    """Upstream gathers a number from every rank in every step, and copies each to the host by itself."""
    from megatron.training.dist_signal_handler import DistributedSignalHandler

    def signals_received(self: Any) -> list[bool]:
        received = torch.tensor([int(self._signal_received)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return [bool(received.item())]

    DistributedSignalHandler.signals_received = signals_received


@functools.cache
def mend() -> None:
    """Apply every mend once; call after `sparsecod_mcore.platform.prepare`."""
    use_prebuilt_index_helpers()
    resume_torch_adamw_in_distributed_optimizer()
    ask_at_once_for_signals()
