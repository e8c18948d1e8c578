"""Text to Megatron's indexed datasets.

A corpus (`FileCorpus`, `HuggingFaceCorpus`, `DocstringCorpus`) yields documents; `preprocess` tokenizes
them in parallel and writes PREFIX_train and PREFIX_valid (.bin/.idx) with their manifest PREFIX.json;
`check_dataset` and `check_vocabulary` look at such data before training does.
"""

from sparsecod_mcore.data.bpe import train_tokenizer
from sparsecod_mcore.data.docstrings import DocstringCorpus
from sparsecod_mcore.data.documents import Corpus, LimitedCorpus
from sparsecod_mcore.data.files import FileCorpus, save_corpus
from sparsecod_mcore.data.hugging_face import HuggingFaceCorpus
from sparsecod_mcore.data.indexed import IndexedFile, check_dataset
from sparsecod_mcore.data.manifest import Manifest, Split, manifest_path, read_manifest, split_prefix
from sparsecod_mcore.data.preprocess import preprocess
from sparsecod_mcore.data.tokenizer import TextTokenizer, load_tokenizer, megatron_tokenizer_arguments
from sparsecod_mcore.data.vocabulary import check_vocabulary, unigram_perplexity

__all__ = [
    "Corpus",
    "DocstringCorpus",
    "FileCorpus",
    "HuggingFaceCorpus",
    "IndexedFile",
    "LimitedCorpus",
    "Manifest",
    "Split",
    "TextTokenizer",
    "check_dataset",
    "check_vocabulary",
    "load_tokenizer",
    "manifest_path",
    "megatron_tokenizer_arguments",
    "preprocess",
    "read_manifest",
    "save_corpus",
    "split_prefix",
    "train_tokenizer",
    "unigram_perplexity",
]
