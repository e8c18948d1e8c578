"""The tokenizer that prompts are read with: lm-eval's rules for its ``hf`` model, on a bare tokenizer.json."""

from dataclasses import dataclass
from pathlib import Path

from sparsecod_mcore.data.tokenizer import TextTokenizer, load_tokenizer
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange.companions import tokenizer_file, tokenizer_of_run


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer whose own rules say which special tokens a text is given."""

    text: TextTokenizer
    prefix_id: int  # what stands before a text without context: the token that begins a text, or else ends one

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; special tokens spelled out in `text` are those tokens.

        The tokenizer's own special tokens are added unless told otherwise, or the text begins with the prefix.
        """
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(self.text.decode([self.prefix_id]))
        ids: list[int] = self.text.model.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def check(self, vocabulary_size: int, model: str) -> None:
        """Raise `UserError` if there are more tokens than `model` knows; it may know more, of which some are unused."""
        if self.text.vocabulary_size > vocabulary_size:
            raise UserError(
                f"the tokenizer has {self.text.vocabulary_size} tokens, more than the vocabulary of {vocabulary_size} "
                f"of the model {model}"
            )


def load_prompt_tokenizer(path: Path, eos_token: str | None = None) -> PromptTokenizer:
    """Load a tokenizer.json. Raises `UserError` as `load_tokenizer` does."""
    text = load_tokenizer(path, eos_token)
    text.model.encode_special_tokens = False  # documents of a corpus are another matter than prompts
    added = text.model.encode("", add_special_tokens=True).ids
    return PromptTokenizer(text, added[0] if added else text.eos_id)


def find_tokenizer(model: Path, given: Path | None = None) -> Path:
    """`given`, or what `model` has beside it: its own tokenizer.json, or the one that its run was trained with.

    Raises `UserError` if there is none.
    """
    if given is not None:
        return tokenizer_file(given)
    converted = (model / "hugging_face", model.absolute().parent / "hugging_face")  # what a conversion carried along
    for own in (folder / "tokenizer.json" for folder in (model, *converted)):
        if own.exists():
            return own
    named = tokenizer_of_run(model)
    if named is not None:
        if not named.tokenizer.exists():
            raise UserError(
                f"{named.config} names the tokenizer {named.tokenizer}, which is not there; --tokenizer names it"
            )
        return named.tokenizer
    raise UserError(f"{model} comes without a tokenizer; --tokenizer names one")
