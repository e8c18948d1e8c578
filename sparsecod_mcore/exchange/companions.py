"""What lies beside the weights of a Hugging Face model: tokenizer, generation config."""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from sparsecod_mcore.config import read_config
from sparsecod_mcore.data.tokenizer import open_tokenizer
from sparsecod_mcore.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION = "generation_config.json"


def carry(source: Path, target: Path, names: tuple[str, ...] = (*TOKENIZER_FILES, GENERATION)) -> None:
    """Copy those of `names` that `source` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class Named(NamedTuple):
    """A tokenizer.json, which need not be there, and the configuration that names it."""

    tokenizer: Path
    config: Path


def tokenizer_of_run(model: Path) -> Named | None:
    """What the run was trained with that `model` is, or is the checkpoints of, or one of them; None where unknown."""
    for folder in (model, *model.absolute().parents[:2]):
        config = folder / "config.yaml"
        named = read_config(config).get("cod.tokenizer") if config.exists() else None
        if named is not None:
            return Named(Path(named), config)
    return None


def tokenizer_file(given: Path) -> Path:
    """What --tokenizer means: a tokenizer.json, or the folder of one."""
    return given / "tokenizer.json" if given.is_dir() else given


def check_vocabulary(given: Path, vocabulary_size: int) -> None:
    """Raise `UserError` if the tokenizer has tokens that a model of `vocabulary_size` does not know."""
    _, model = open_tokenizer(tokenizer_file(given))
    size = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > vocabulary_size:
        raise UserError(
            f"the tokenizer {given} has {size} tokens, more than the vocabulary of {vocabulary_size} of the model; "
            "--tokenizer names the model's own"
        )


def carry_tokenizer(given: Path, target: Path) -> None:
    """Copy what --tokenizer names: a folder with a tokenizer.json, or the file. Raises `UserError` for others."""
    open_tokenizer(tokenizer_file(given))
    for name in TOKENIZER_FILES:
        (target / name).unlink(missing_ok=True)
    if given.is_dir():
        carry(given, target, TOKENIZER_FILES)
    else:
        shutil.copyfile(given, target / "tokenizer.json")


def complete(target: Path, args: Namespace) -> dict[str, Any]:
    """Write what a run of this project's does not have: tokenizer_config.json and generation_config.json.

    Returns the entries of config.json that name special tokens. Nothing begins a document; the end-of-text token,
    whose id `args` has, ends it.
    """
    end = getattr(args, "null_tokenizer_eod_id", None)
    tokenizer = target / "tokenizer.json"
    if tokenizer.exists() and not (target / "tokenizer_config.json").exists():
        _, model = open_tokenizer(tokenizer)
        word = None if end is None else model.id_to_token(end)
        if end is not None and word is None:
            raise UserError(f"{tokenizer.name} has no token {end}, with which the run ended its documents")
        content = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": args.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **({} if word is None else {"eos_token": word, "pad_token": word}),
        }
        (target / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    special = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    if not (target / GENERATION).exists():
        (target / GENERATION).write_text(json.dumps(special, indent=2) + "\n")
    return special
