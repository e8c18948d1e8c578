"""Readies the platform before any test of this folder imports Megatron."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from sparsecod_mcore import platform

platform.prepare()

from megatron.core import parallel_state  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def leave_no_process_group() -> Iterator[None]:
    """Tests of other folders make their own in the same process."""
    yield
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
