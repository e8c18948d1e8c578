"""A job that evaluates models several ways, all its processes together, and has them continue 40 texts by one token.

Arguments: OUT, TASK_DATA, TOKENIZER, TOKENS, then NAME:TENSOR:EXPERT=MODEL for each.
"""

import json
import sys
from pathlib import Path

import torch

from sparsecod_mcore import platform

platform.prepare()

from megatron.core import parallel_state  # noqa: E402

from sparsecod_mcore.evaluation.likelihood import Likelihoods, make_query  # noqa: E402
from sparsecod_mcore.evaluation.run import Request, evaluate_model  # noqa: E402
from sparsecod_mcore.evaluation.vocabulary import predictions  # noqa: E402
from sparsecod_mcore.scoring.stack import Stack, load_stack  # noqa: E402


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
        best = greedy(load_stack(Path(model), tensor=int(tensor), expert=int(expert)))
        (Path(out) / name / "greedy.json").write_text(json.dumps(best))
        parallel_state.destroy_model_parallel()


def greedy(stack: Stack) -> list[int]:
    """What a text of 40 tokens and its beginnings are most probably continued with; likelihoods have to agree."""
    text = [37 * position % 500 for position in range(40)]
    hidden_SBD = stack.embed(torch.tensor([text]))
    for layer in range(stack.num_layers):
        hidden_SBD = stack.layer(layer, hidden_SBD)
    tokens: list[int] = predictions(stack, hidden_SBD[:, 0], torch.zeros(40, dtype=torch.int64))[1].tolist()
    for other in (0, 1):
        queries = [make_query(text[: n + 1], [token + other], 160) for n, token in enumerate(tokens)]
        assert [score.is_greedy for score in Likelihoods(stack).score(queries)] == [not other] * 40
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
