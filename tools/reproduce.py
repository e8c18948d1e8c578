#!/usr/bin/env python
"""Ask the paper's questions at a small size: train, score, and print each trend found beside the trend published."""

import os
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line

platform.prepare()  # before anything imports Megatron

from sparsecod_mcore.experiments.questions import QUESTIONS  # noqa: E402
from sparsecod_mcore.experiments.reproduce import reproduce  # noqa: E402
from sparsecod_mcore.experiments.sizes import SEEDS, size_of  # noqa: E402


@command_line
def main() -> None:
    default = "small" if platform.has_gpu() else "micro"
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--size", default=default, metavar="SIZE", help="micro (CPU) or small (GPU); here: %(default)s")
    parser.add_argument("--question", metavar="NAME", help=f"one of {', '.join(QUESTIONS)} (default: all)")
    parser.add_argument("--corpus", metavar="PATH", help="text or JSONL(.gz, .zst); default: docstrings")
    parser.add_argument("--tokenizer", metavar="JSON", type=Path, help="default: a BPE trained on the corpus")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    reproduce(
        size_of(arguments.size),
        QUESTIONS if arguments.question is None else [arguments.question],
        corpus_path=arguments.corpus,
        tokenizer=arguments.tokenizer and Path(os.path.abspath(arguments.tokenizer)),
        seeds=range(1, arguments.seeds + 1),
    )


if __name__ == "__main__":
    main()
