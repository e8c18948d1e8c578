"""The tokenizer that prompts are read with: lm-eval's rules for its ``hf`` model, on a bare tokenizer.json."""

from dataclasses import dataclass
from pathlib import Path

from sparsecod_mcore.config import read_config
from sparsecod_mcore.data.tokenizer import TextTokenizer, load_tokenizer
from sparsecod_mcore.errors import UserError


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
        return given / "tokenizer.json" if given.is_dir() else given
    converted = (model / "hugging_face", model.absolute().parent / "hugging_face")  # what a conversion carried along
    for own in (folder / "tokenizer.json" for folder in (model, *converted)):
        if own.exists():
            return own
    for folder in (model, *model.absolute().parents[:2]):  # a run, its checkpoints/, one of them
        config = folder / "config.yaml"
        named = read_config(config).get("cod.tokenizer") if config.exists() else None
        if named is not None:
            if not Path(named).exists():
                raise UserError(f"{config} names the tokenizer {named}, which is not there; --tokenizer names it")
            return Path(named)
    raise UserError(f"{model} comes without a tokenizer; --tokenizer names one")
