"""Tokenizers in the Hugging Face `tokenizers` JSON format, and how Megatron is told of one."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from sparsecod_mcore.errors import UserError, nearest

# Names under which published tokenizers keep their end-of-text token, the most specific first.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer.json and what training has to know of it."""

    sha256: str  # of the file
    vocabulary_size: int  # largest token id + 1
    eos_token: str
    eos_id: int
    model: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a document, closed by the end-of-text token and with no other special token.

        Text that happens to spell a special token is encoded as the characters it consists of.
        """
        [encoding] = self.model.encode_batch_fast([text], add_special_tokens=False)
        return [*encoding.ids, self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        text: str = self.model.decode(ids, skip_special_tokens=False)
        return text


def open_tokenizer(path: Path) -> tuple[bytes, Tokenizer]:
    """A tokenizer.json's content, and what the library makes of it. Raises `UserError` if it is missing or none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read ({error.strerror})") from None
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise UserError(f"the tokenizer {path} is not valid JSON ({error})") from None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
        raise UserError(f"{path} is not a tokenizer.json of Hugging Face tokenizers: it has no model")
    try:
        return content, Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizer {path} is not accepted by Hugging Face tokenizers ({error})") from None


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> TextTokenizer:
    """Load a tokenizer.json; `eos_token` overrides the search for one of `EOS_TOKENS`.

    Raises `UserError` if the file is missing or no tokenizer, or its end-of-text token cannot be found.
    """
    content, model = open_tokenizer(Path(path))
    model.encode_special_tokens = True
    # A stored limit or padding would cut or fill documents.
    model.no_truncation()
    model.no_padding()
    vocabulary = model.get_vocab(with_added_tokens=True)
    if eos_token is None:
        eos_token = next((token for token in EOS_TOKENS if token in vocabulary), None)
        if eos_token is None:
            raise UserError(
                f"the tokenizer {path} has no end-of-text token of a usual name ({', '.join(EOS_TOKENS)}); "
                "name it with --eos-token"
            )
    elif eos_token not in vocabulary:
        hint = nearest(eos_token, (token.content for token in model.get_added_tokens_decoder().values()))
        raise UserError(f"the tokenizer {path} has no token {eos_token!r}{hint}")
    return TextTokenizer(
        sha256=hashlib.sha256(content).hexdigest(),
        vocabulary_size=max(vocabulary.values()) + 1,
        eos_token=eos_token,
        eos_id=vocabulary[eos_token],
        model=model,
    )


def megatron_tokenizer_arguments(tokenizer: TextTokenizer) -> dict[str, str | int]:
    """Megatron's arguments for training on data of this tokenizer.

    Training reads indexed tokens and asks a tokenizer for its vocabulary size and end-of-document id alone,
    which Megatron's NullTokenizer states without transformers or network; its HuggingFaceTokenizer knows no
    end of document for a bare tokenizer.json.
    """
    return {
        "tokenizer_type": "NullTokenizer",
        "vocab_size": tokenizer.vocabulary_size,
        "null_tokenizer_eod_id": tokenizer.eos_id,
    }
