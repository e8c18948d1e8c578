"""Fixtures for every test."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data: where SPARSECOD_DATA points, else shared/data beside the repository."""
    named = os.environ.get("SPARSECOD_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (SPARSECOD_DATA names its folder)")
    return folder


def cuda_or_skip() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors are to lie: a test that takes it runs on the CPU, and with `-m gpu` on CUDA."""
    return cuda_or_skip() if request.param == "cuda" else "cpu"


@pytest.fixture
def cuda() -> str:
    """The CUDA device, for tests that are marked gpu as a whole."""
    return cuda_or_skip()
