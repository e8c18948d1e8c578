"""Fixtures for every test."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data: where SPARSECOD_DATA points, else shared/data beside the repository."""
    named = os.environ.get("SPARSECOD_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (SPARSECOD_DATA names its folder)")
    return folder
