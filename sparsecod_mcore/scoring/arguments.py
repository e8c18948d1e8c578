"""The command-line arguments that name a model and how it is loaded, shared by the tools that read one."""

import argparse

from sparsecod_mcore.scoring.run import DTYPES


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--dtype`` and the parallel sizes."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a run's directory, a torch_dist checkpoint or a Hugging Face one"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and hidden states")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--expert-parallel-size", type=int, default=1, metavar="N")
