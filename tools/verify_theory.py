#!/usr/bin/env python
"""Check the paper's theorems by Monte Carlo: under their assumptions, without them, and against a trained model.

Prints a table, and writes theory.json and a figure per theorem to OUT. The same seed gives the same figures.
"""

import argparse
from pathlib import Path

from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line
from sparsecod_mcore.theory.run import DEFAULT_SAMPLES, LEAST_SAMPLES, THEOREMS, Request, verify_into


def numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is given, numbers such as 1,3 are accepted") from None


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theorems", type=numbers, default=tuple(THEOREMS), metavar="N,...", help="of 1 to 6; all")
    parser.add_argument(
        "--samples",
        type=int,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help=f"{LEAST_SAMPLES} or more; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--model", metavar="DIR", help="compare with this one: a run's directory, a checkpoint or a Hugging Face one"
    )
    parser.add_argument(
        "--data", help="its tokens: .npy [sequences, length + 1] or a prefix of tools/preprocess_data.py; random ones"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    arguments = parser.parse_args()
    request = Request(
        theorems=arguments.theorems,
        samples=arguments.samples,
        seed=arguments.seed,
        model=arguments.model,
        data=arguments.data,
    )
    verify_into(arguments.out, request)


if __name__ == "__main__":
    main()
