"""A job of two processes that measures models three ways: tensor parallel, data parallel, expert parallel.

Arguments: LAYOUT=CHECKPOINT for each, tokens, and the folder for the results of both ranks.
"""

import sys
from pathlib import Path

from sparsecod_mcore import platform

platform.prepare()

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from sparsecod_mcore.scoring.measure import Request, measure  # noqa: E402
from sparsecod_mcore.scoring.results import write_scores  # noqa: E402

PARALLEL = {"tensor": {"tensor": 2}, "data": {}, "expert": {"expert": 2}}


def main(*arguments: str) -> None:
    *models, tokens, folder = arguments
    for layout, _, model in (argument.partition("=") for argument in models):
        scores = measure(Request(model=model, data=tokens, lengths=[49, 20], **PARALLEL[layout]))
        write_scores(Path(folder), scores, f"{layout}-{dist.get_rank()}")
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main(*sys.argv[1:])
