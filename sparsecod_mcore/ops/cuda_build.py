"""What an operator does with CUDA tensors where the extension was built without CUDA."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from sparsecod_mcore import _C

ALLOW_FALLBACK = "SPARSECOD_FALLBACK"


def without_values(x: Tensor) -> Tensor:
    """The same on the meta device, where operators check their arguments and do nothing."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _laid_out_like(x: Tensor, layout: Tensor) -> Tensor:
    if x.stride() == layout.stride():
        return x
    return torch.empty_strided(layout.shape, layout.stride(), dtype=x.dtype, device=x.device).copy_(x)


def register_cuda_fallback(operator: str, reference: Callable[..., Any]) -> None:
    """Let `reference`, which takes the arguments of the operator's schema, stand in for missing CUDA kernels.

    Only if the environment variable SPARSECOD_FALLBACK is 1 when the operator is called; else a RuntimeError says how
    to build the kernels. Nothing is registered where they were built. The operator's Meta function checks the arguments
    and says how results lie in memory.
    """
    if _C.HAS_CUDA:
        return

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get(ALLOW_FALLBACK) != "1":
            raise RuntimeError(
                f"sparsecod::{operator} was given CUDA tensors, but the extension was built without CUDA: build it "
                f"with SPARSECOD_CUDA=on where nvcc is, or set {ALLOW_FALLBACK}=1 for the slower PyTorch reference"
            )
        meta_args, meta_kwargs = tree_map_only(torch.Tensor, without_values, (args, kwargs))
        layouts = getattr(torch.ops.sparsecod, operator).default(*meta_args, **meta_kwargs)
        return tree_map(_laid_out_like, reference(*args, **kwargs), layouts)

    torch.library.impl(f"sparsecod::{operator}", "CUDA")(on_cuda)
