"""Writing one split with Megatron's own builder."""

import logging
import warnings
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecod_mcore.data.atomic import publish, temporary
from sparsecod_mcore.data.manifest import Split


class SplitWriter:
    """Writes one split under temporary names, one sequence per document."""

    def __init__(self, prefix: str, vocabulary_size: int) -> None:
        self._paths = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        megatron = _megatron_indexed_dataset()
        self.token_type: type[np.integer] = megatron.DType.optimal_dtype(vocabulary_size)
        self._builder = megatron.IndexedDatasetBuilder(str(temporary(self._paths[0])), dtype=self.token_type)
        # The builder keeps two numbers per document in Python lists: 8 GB for 10^8 documents.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])
        self._tokens = 0
        self._max_token_id = -1

    def add(self, tokens_N: NDArray[np.integer]) -> None:
        """Append a document."""
        self._builder.add_document(tokens_N, [len(tokens_N)])
        self._tokens += len(tokens_N)
        self._max_token_id = max(self._max_token_id, int(tokens_N.max()))

    def close(self) -> Split:
        """Complete the files, still under their temporary names."""
        self._builder.finalize(str(temporary(self._paths[1])))
        return Split(
            documents=len(self._builder.document_indices) - 1,
            tokens=self._tokens,
            max_token_id=self._max_token_id,
            bytes=self._tokens * np.dtype(self.token_type).itemsize,
        )

    def publish(self) -> None:
        """Give the files their names."""
        for path in self._paths:
            publish(path)


def _megatron_indexed_dataset() -> Any:
    # Importing Megatron takes seconds and warns of absent GPU packages, which writing data does not need.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
