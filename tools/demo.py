#!/usr/bin/env python
"""Train and score two small models on any text, or on docstrings: a naive deep one and one with the paper's recipe."""

from pathlib import Path

from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.demo import run_demo
from sparsecod_mcore.errors import command_line


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", metavar="PATH", help="text or JSONL(.gz, .zst); default: docstrings")
    parser.add_argument("--tokenizer", metavar="JSON", type=Path, help="default: a BPE trained on the corpus")
    arguments = parser.parse_args()
    run_demo(arguments.corpus, arguments.tokenizer)


if __name__ == "__main__":
    main()
