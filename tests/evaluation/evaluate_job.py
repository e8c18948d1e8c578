"""A job that evaluates models several ways, all its processes together.

Arguments: OUT, TASK_DATA, TOKENIZER, TOKENS, then NAME:TENSOR:EXPERT=MODEL for each.
"""

import sys
from pathlib import Path

from sparsecod_mcore import platform

platform.prepare()

from megatron.core import parallel_state  # noqa: E402

from sparsecod_mcore.evaluation.run import Request, evaluate_model  # noqa: E402


def main(out: str, task_data: str, tokenizer: str, tokens: str, *jobs: str) -> None:
    for job, model in (argument.split("=") for argument in jobs):
        name, tensor, expert = job.split(":")
        evaluate_model(
            Request(
                model=model,
                tasks=["arc_easy", "perplexity"],
                out=Path(out) / name,
                task_data=Path(task_data),
                tokenizer=Path(tokenizer),
                data=tokens,
                limit=12,
                batch_tokens=512,
                tensor=int(tensor),
                expert=int(expert),
            )
        )
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main(*sys.argv[1:])
