"""Readies the platform before any test of this folder imports Megatron, and makes the models that are evaluated."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.scoring.conftest import leave_no_process_group  # noqa: F401  a fixture

from sparsecod_mcore.data.bpe import train_tokenizer  # isort: skip
from sparsecod_mcore.data.files import FileCorpus
from tests.scoring.random_models import save_as_megatron


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As jobs have; the same number gives the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Pretrained:
    """A model with trained weights, of 512 tokens and 512 positions; questions for it."""

    hugging_face: Path
    tokenizer: Path
    task_data: Path


@pytest.fixture(scope="session")
def pretrained(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """Its tokenizer begins texts with <s>, as Llama's do."""
    folder = tmp_path_factory.mktemp("pretrained")
    shutil.copytree(shared_data / "stories260k", folder / "hf", copy_function=shutil.copy)
    path = folder / "hf" / "tokenizer.json"
    corpus = FileCorpus([str(shared_data / "eval" / "arc_easy_test.jsonl.gz")], text_key="question")
    train_tokenizer(corpus, path, vocabulary_size=511)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 511)])
    tokenizer.save(str(path))
    return Pretrained(folder / "hf", path, shared_data / "eval")


@pytest.fixture(scope="session")
def checkpoint(pretrained: Pretrained) -> Path:
    """The same weights as a torch_dist checkpoint, without a tokenizer."""
    folder = pretrained.hugging_face.with_name("torch_dist")
    save_as_megatron(pretrained.hugging_face, folder)
    return folder
