"""Training a byte-level BPE on a corpus."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.data.documents import Corpus, text_of
from sparsecod_mcore.data.progress import Progress
from sparsecod_mcore.errors import UserError

EOS_TOKEN = "<|endoftext|>"
SMALLEST_VOCABULARY = 1 + len(pre_tokenizers.ByteLevel.alphabet())  # the end-of-text token and every byte


def train_tokenizer(corpus: Corpus, output: str | Path, vocabulary_size: int = 4096) -> int:
    """Train a byte-level BPE and write its tokenizer.json to `output`; return the size of its vocabulary.

    Token 0 is ``<|endoftext|>``, then come the 256 bytes, so that every text can be encoded and decoded
    without loss. The vocabulary stays smaller than asked where the text has too few different pairs. Raises
    `UserError` for a vocabulary below `SMALLEST_VOCABULARY` and a corpus without text.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocabulary_size} tokens is too small: "
            f"the end-of-text token and the 256 bytes need {SMALLEST_VOCABULARY}"
        )
    make_folder(Path(output).parent)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        with Progress("counting words") as progress:
            for record in corpus.records():
                text = text_of(record)
                progress.advance(1, len(text), record.fraction)
                yield text

    tokenizer.train_from_iterator(texts(), trainer)
    size: int = tokenizer.get_vocab_size()
    if size == SMALLEST_VOCABULARY < vocabulary_size:
        raise UserError("the corpus has no text to train a tokenizer on")
    write_atomically(Path(output), tokenizer.to_str(pretty=True).encode("utf-8"))
    print(
        f"wrote {output}: {size:,} tokens"
        + ("" if size == vocabulary_size else f" of {vocabulary_size:,}: too little text")
    )
    return size
