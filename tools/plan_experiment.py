#!/usr/bin/env python
"""What runs take: parameters, FLOPs, tokens, steps, memory, a parallel layout, communication, time; no GPU is needed.

Any flag of Megatron overrides all configurations; parallel sizes in either give the layout, else one is suggested.
"""

from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import UserError, command_line

platform.prepare()  # before anything imports Megatron

from sparsecod_mcore.experiments.budgets import describe_match  # noqa: E402
from sparsecod_mcore.experiments.plan import (  # noqa: E402
    describe,
    describe_candidates,
    fastest_layouts,
    machine_of,
    make_plan,
)


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--gpu", default="H100", metavar="KIND", help="default: %(default)s")
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="assumed, while computing (default: %(default)s)"
    )
    parser.add_argument("--compare", type=int, metavar="N", help="also show the N layouts with the shortest steps")
    parser.add_argument("--match", choices=("tokens", "flops", "params"), help="compare budgets with the first's")
    arguments, flags = parser.parse_known_args()
    if arguments.match is not None and len(arguments.configs) < 2:
        raise UserError("--match compares configurations: two or more are needed")
    machine = machine_of(arguments.gpu, arguments.gpus, arguments.mfu)
    plans = [make_plan(path, flags, machine) for path in arguments.configs]
    texts = [describe(plan) for plan in plans]
    if arguments.compare is not None:
        for index, path in enumerate(arguments.configs):
            candidates = fastest_layouts(path, flags, machine, arguments.compare)
            texts[index] += f"\n{describe_candidates(candidates)}"
    print("\n\n".join(texts))
    if arguments.match is not None:
        print(f"\n{describe_match(plans, arguments.match)}")


if __name__ == "__main__":
    main()
