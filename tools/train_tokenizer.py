#!/usr/bin/env python
"""Train a byte-level BPE on a corpus and write its tokenizer.json; token 0 is <|endoftext|>."""

from sparsecod_mcore.data.arguments import ArgumentParser, add_corpus_arguments, corpus_from
from sparsecod_mcore.data.bpe import train_tokenizer
from sparsecod_mcore.errors import command_line


@command_line
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_corpus_arguments(parser)
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="JSON")
    arguments = parser.parse_args()
    train_tokenizer(corpus_from(arguments), arguments.output, arguments.vocab_size)


if __name__ == "__main__":
    main()
