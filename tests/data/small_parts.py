"""For tests: preprocess CORPUS into PREFIX with TOKENIZER, in parts small enough to be killed between."""

import sys

from sparsecod_mcore.data import FileCorpus, parts, preprocess

PART_BYTES = 50_000

if __name__ == "__main__":
    parts.PART_BYTES = PART_BYTES
    corpus, prefix, tokenizer = sys.argv[1:]
    preprocess(FileCorpus([corpus]), prefix, tokenizer, workers=2)
