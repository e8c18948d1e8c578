"""What an operator does with CUDA tensors where the extension was built without CUDA."""

import os
from collections.abc import Callable
from typing import Any

import torch

from sparsecod_mcore import _C

ALLOW_FALLBACK = "SPARSECOD_FALLBACK"


def register_cuda_fallback(operator: str, reference: Callable[..., Any]) -> None:
    """Let `reference`, which takes the arguments of the operator's schema, stand in for missing CUDA kernels.

    Only if the environment variable SPARSECOD_FALLBACK is 1 when the operator is called; else a RuntimeError says how
    to build the kernels. Nothing is registered where they were built.
    """
    if _C.HAS_CUDA:
        return

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get(ALLOW_FALLBACK) != "1":
            raise RuntimeError(
                f"sparsecod::{operator} was given CUDA tensors, but the extension was built without CUDA: build it "
                f"with SPARSECOD_CUDA=on where nvcc is, or set {ALLOW_FALLBACK}=1 for the slower PyTorch reference"
            )
        return reference(*args, **kwargs)

    torch.library.impl(f"sparsecod::{operator}", "CUDA")(on_cuda)
