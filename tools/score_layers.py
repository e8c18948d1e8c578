#!/usr/bin/env python
"""Score the layers of a trained model by interventions: which do work, and which are wasted.

Writes scores.json, scores.csv and figures to OUT. Under torchrun, work is spread over the ranks. After an interruption
the same command goes on: interventions that were finished are not run again; what is measured of the model as it is,
Jacobians among it, is.
"""

import argparse
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import UserError, command_line

platform.prepare()  # before anything imports Megatron

from sparsecod_mcore.scoring.arguments import add_model_arguments  # noqa: E402
from sparsecod_mcore.scoring.registry import SCORES  # noqa: E402
from sparsecod_mcore.scoring.run import Request, score_and_show  # noqa: E402
from sparsecod_mcore.scoring.score import Options  # noqa: E402


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help=".npy of tokens [sequences, length + 1], or what tools/preprocess_data.py --output made",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--scores", metavar="NAME,…", help=f"of {', '.join(SCORES)} (default: all that the model has)")
    parser.add_argument(
        "--sequences", type=int, metavar="N", help="the first N (default: 64 of a dataset, all of .npy)"
    )
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a sequence that are inputs")
    parser.add_argument("--pairs", default="all", metavar="sample:N", help="permutation of N pairs, with an interval")
    parser.add_argument(
        "--jacobian",
        default="all",
        metavar="probes:N",
        help="norms from N random directions (2 or more) instead of the whole matrix, `all`",
    )
    parser.add_argument(
        "--jacobian-sequences", type=int, default=8, metavar="N", help="that Jacobians are of (default: %(default)s)"
    )
    parser.add_argument(
        "--compat", choices=("paper", "reference"), default="paper", help="reference: as published scripts"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the sample of pairs (default: %(default)s)")
    parser.add_argument("--memory-budget", type=float, metavar="GIB", help="for all but the model and PyTorch")
    arguments = parser.parse_args()
    score_and_show(
        Request(
            model=arguments.model,
            data=arguments.data,
            names=None if arguments.scores is None else [name for name in arguments.scores.split(",") if name],
            out=arguments.out,
            sequences=arguments.sequences,
            length=arguments.length,
            dtype=arguments.dtype,
            tensor=arguments.tensor_parallel_size,
            expert=arguments.expert_parallel_size,
            budget=None if arguments.memory_budget is None else int(arguments.memory_budget * 2**30),
            options=Options(
                compat=arguments.compat,
                sampled_pairs=_count_of("sample", "--pairs", arguments.pairs),
                jacobian_sequences=arguments.jacobian_sequences,
                jacobian_probes=_count_of("probes", "--jacobian", arguments.jacobian),
                seed=arguments.seed,
            ),
        )
    )


def _count_of(kind: str, flag: str, given: str) -> int | None:
    """N of ``KIND:N``; None for ``all``."""
    if given == "all":
        return None
    word, _, count = given.partition(":")
    if word != kind or not count.isdigit() or int(count) < 2:
        raise UserError(f"{flag} {given} is given; all, or {kind}:N with N of 2 or more, is accepted")
    return int(count)


if __name__ == "__main__":
    main()
