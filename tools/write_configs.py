#!/usr/bin/env python
"""Write the configurations of examples/configs/{paper,micro,small} from the tables in sparsecod_mcore/experiments/."""

from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line
from sparsecod_mcore.experiments.config_files import CONFIGS, write_configs


@command_line
def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    print(f"{write_configs()} configurations in {CONFIGS}")


if __name__ == "__main__":
    main()
