"""The command-line arguments that name a corpus, shared by the tools that read one."""

import argparse
from typing import NoReturn

from sparsecod_mcore.data.docstrings import DocstringCorpus
from sparsecod_mcore.data.documents import Corpus, LimitedCorpus
from sparsecod_mcore.data.files import FileCorpus
from sparsecod_mcore.data.hugging_face import HuggingFaceCorpus
from sparsecod_mcore.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, as for every other mistake, and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `corpus_from` reads."""
    group = parser.add_argument_group("corpus (files, --docstrings or --hf-dataset)")
    group.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text files (a document each), JSONL, either also as .gz or .zst, and glob patterns of these",
    )
    group.add_argument(
        "--docstrings",
        action="store_true",
        help="English of the docstrings of Python and the installed packages",
    )
    group.add_argument(
        "--hf-dataset",
        metavar="NAME",
        help="Hugging Face data set, streamed: a name on the hub, a folder, or .parquet or .arrow files",
    )
    group.add_argument("--hf-config", metavar="CONFIG", help="its configuration, such as sample-100BT of FineWeb-Edu")
    group.add_argument("--hf-split", metavar="SPLIT", default="train", help="its split (default: %(default)s)")
    group.add_argument(
        "--text-key", metavar="KEY", default="text", help="key or column of the text (default: %(default)s)"
    )
    group.add_argument("--limit-documents", type=int, metavar="N", help="read the first N documents only")


def corpus_from(arguments: argparse.Namespace) -> Corpus:
    """The corpus that parsed arguments name. Raises `UserError` unless they name exactly one."""
    named = [bool(arguments.inputs), arguments.docstrings, arguments.hf_dataset is not None]
    if sum(named) != 1:
        raise UserError("a corpus is one of: input files, --docstrings, --hf-dataset NAME")
    if arguments.hf_config is not None and arguments.hf_dataset is None:
        raise UserError("--hf-config needs --hf-dataset")
    corpus: Corpus
    if arguments.docstrings:
        corpus = DocstringCorpus()
    elif arguments.hf_dataset is not None:
        corpus = HuggingFaceCorpus(arguments.hf_dataset, arguments.hf_config, arguments.hf_split, arguments.text_key)
    else:
        corpus = FileCorpus(arguments.inputs, arguments.text_key)
    return corpus if arguments.limit_documents is None else LimitedCorpus(corpus, arguments.limit_documents)
