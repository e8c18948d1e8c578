#!/usr/bin/env python
"""Convert a Hugging Face model into a torch_dist checkpoint of Megatron's, or a checkpoint into a Hugging Face model.

Which way, the input tells. Tensors pass through one at a time; OUT appears when all is written.
"""

import argparse
from pathlib import Path

from sparsecod_mcore import platform
from sparsecod_mcore.data.arguments import ArgumentParser
from sparsecod_mcore.errors import command_line

platform.prepare()  # before anything imports Megatron

from sparsecod_mcore.exchange.convert import DTYPES, Request, bytes_of, convert  # noqa: E402


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="Hugging Face directory, torch_dist checkpoint, or run"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--to", choices=("megatron", "hf"), help="default: whichever --model is not")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the weights (default: as they are)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of safetensors (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, or a folder of it (default: the model's own)"
    )
    arguments = parser.parse_args()
    convert(
        Request(
            model=arguments.model,
            out=arguments.out,
            to=arguments.to,
            dtype=DTYPES[arguments.dtype],
            max_shard_size=bytes_of(arguments.max_shard_size),
            tokenizer=arguments.tokenizer,
        )
    )


if __name__ == "__main__":
    main()
