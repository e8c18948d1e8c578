#!/usr/bin/env python
"""Make one HTML file of runs and scores, side by side: which layers work, why, and what to try next."""

from pathlib import Path

from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line
from sparsecod_mcore.report.page.command import make_report


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_OR_SCORES", help="a run's directory, or a folder of scores"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="HTML", help="default: %(default)s")
    arguments = parser.parse_args()
    make_report(arguments.paths, arguments.out)


if __name__ == "__main__":
    main()
