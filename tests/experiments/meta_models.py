"""Models without memory: built on the meta device from a configuration's validated arguments."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sparsecod_mcore.model.build import build_model, evaluation_arguments
from sparsecod_mcore.scoring import parallel


class _OnMeta(TorchFunctionMode):
    """`torch.device("meta")` for factories that stand-ins for CUDA have wrapped, and whatever device they name."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        makes_parameters = getattr(function, "__name__", "") in ("empty", "ones", "zeros")
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if makes_parameters else {}))


def build_on_meta(args: Namespace) -> torch.nn.Module:
    """The whole model, as one process would hold it."""
    parallel.initialise(1, 1)
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # where Megatron keeps the attention backend of a process's one model
    with _OnMeta():
        return build_model(evaluation_arguments(vars(args), torch.bfloat16))
