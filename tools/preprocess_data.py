#!/usr/bin/env python
"""Tokenize a corpus into Megatron's indexed format: PREFIX_train, PREFIX_valid (.bin/.idx) and PREFIX.json.

An interrupted run goes on where it stopped when the same command is given again.
"""

import argparse

from sparsecod_mcore.data.arguments import ArgumentParser, add_corpus_arguments, corpus_from
from sparsecod_mcore.data.files import FileCorpus
from sparsecod_mcore.data.preprocess import DEFAULT_VALID_FRACTION, preprocess
from sparsecod_mcore.errors import command_line


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--tokenizer", required=True, metavar="JSON", help="tokenizer.json of Hugging Face tokenizers")
    parser.add_argument("--eos-token", metavar="TOKEN", help="end-of-text token, if it is not one of a usual name")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=DEFAULT_VALID_FRACTION,
        metavar="F",
        help="share of documents to hold out, 0 for none (default: %(default)s)",
    )
    parser.add_argument("--valid-input", nargs="+", metavar="INPUT", help="hold out these files instead")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace what PREFIX holds")
    arguments = parser.parse_args()
    preprocess(
        corpus_from(arguments),
        arguments.output,
        arguments.tokenizer,
        valid_corpus=FileCorpus(arguments.valid_input, arguments.text_key) if arguments.valid_input else None,
        valid_fraction=arguments.valid_fraction,
        eos_token=arguments.eos_token,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )


if __name__ == "__main__":
    main()
