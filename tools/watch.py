#!/usr/bin/env python
"""Show a run in the terminal while it trains: curves, variance by layer, time left. Ctrl-C leaves; the run goes on."""

from pathlib import Path

from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line
from sparsecod_mcore.report.watch import watch


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="show one frame and end, as where output is no terminal")
    arguments = parser.parse_args()
    watch(arguments.run, seconds=arguments.every, once=arguments.once)


if __name__ == "__main__":
    main()
