#!/usr/bin/env python
"""Evaluate a model zero-shot: lm-eval's multiple-choice tasks, and perplexity on held-out text.

Writes evaluation.json and items.jsonl to OUT, and prints each accuracy beside what guessing and the length of answers
give. Under torchrun, processes share the work, or the model. After an interruption the same command goes on.
"""

import argparse
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line

platform.prepare()  # before anything imports Megatron

from sparsecod_mcore.evaluation.run import Request, evaluate_and_show  # noqa: E402
from sparsecod_mcore.evaluation.task_list import LOCAL_TASKS, PAPER_TASKS, PERPLEXITY  # noqa: E402
from sparsecod_mcore.scoring.arguments import add_model_arguments  # noqa: E402


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--tasks",
        default=",".join(PAPER_TASKS),
        metavar="NAME,…",
        help=f"{PERPLEXITY}, and tasks or groups of lm-eval (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for evaluation.json and items.jsonl, which take the place of earlier ones there",
    )
    parser.add_argument("--task-data", type=Path, metavar="DIR", help=f"local questions for {', '.join(LOCAL_TASKS)}")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json (default: the model's own)")
    parser.add_argument("--eos-token", metavar="TOKEN", help="its end-of-text token, if of an unusual name")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    parser.add_argument(
        "--data", metavar="DATA", help="for perplexity: .npy of tokens [sequences, length + 1], or a prepared prefix"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="the first N of it")
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a sequence that are inputs")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="that go through the model together")
    arguments = parser.parse_args()
    evaluate_and_show(
        Request(
            model=arguments.model,
            tasks=[name for name in arguments.tasks.split(",") if name],
            out=arguments.out,
            task_data=arguments.task_data,
            tokenizer=arguments.tokenizer,
            eos_token=arguments.eos_token,
            limit=arguments.limit,
            data=arguments.data,
            sequences=arguments.sequences,
            length=arguments.length,
            dtype=arguments.dtype,
            tensor=arguments.tensor_parallel_size,
            expert=arguments.expert_parallel_size,
            batch_tokens=arguments.batch_tokens,
        )
    )


if __name__ == "__main__":
    main()
