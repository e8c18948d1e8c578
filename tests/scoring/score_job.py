"""A job that scores one checkpoint several ways, all its processes together.

Arguments: OUT, then NAME:TENSOR:EXPERT:SCORE,SCORE=CHECKPOINT=DATA for each.
"""

import sys
from pathlib import Path

from sparsecod_mcore import platform

platform.prepare()

from megatron.core import parallel_state  # noqa: E402

from sparsecod_mcore.scoring.run import Request, score_model  # noqa: E402


def main(out: str, *jobs: str) -> None:
    for job, model, data in (argument.split("=") for argument in jobs):
        name, tensor, expert, scores = job.split(":")
        score_model(
            Request(
                model=model,
                data=data,
                names=scores.split(","),
                out=Path(out) / name,
                tensor=int(tensor),
                expert=int(expert),
            )
        )
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main(*sys.argv[1:])
