#!/usr/bin/env python
"""Measure a model as it is: sparsity of its weights and its attention, attention's entropy, moments of every stream.

Writes sparsity.json, sparsity.csv and figures to OUT. Under torchrun, processes share the sequences, or the model. An
interrupted run goes on after the last length that it finished when the same command is given again.
"""

import argparse
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line

platform.prepare()  # before anything imports Megatron

from sparsecod_mcore.scoring.arguments import add_model_arguments  # noqa: E402
from sparsecod_mcore.scoring.measure import WHAT, Request, measure_into  # noqa: E402


def names(text: str) -> list[str]:
    return text.split(",")


def lengths(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--what", type=names, default=WHAT, metavar="NAME,...", help=f"of {', '.join(WHAT)}; all")
    parser.add_argument(
        "--data", help=".npy of tokens [sequences, length + 1], or a prefix of tools/preprocess_data.py"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="the first N")
    parser.add_argument("--lengths", type=lengths, default=[], metavar="T,...", help="of sequences, cut to these")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    arguments = parser.parse_args()
    request = Request(
        model=arguments.model,
        what=arguments.what,
        data=arguments.data,
        sequences=arguments.sequences,
        lengths=arguments.lengths,
        dtype=arguments.dtype,
        tensor=arguments.tensor_parallel_size,
        expert=arguments.expert_parallel_size,
    )
    measure_into(arguments.out, request)


if __name__ == "__main__":
    main()
