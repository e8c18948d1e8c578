"""Readies the platform before any test of this folder imports Megatron, and makes the models that are evaluated."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.data.bpe import train_tokenizer  # noqa: E402
from sparsecod_mcore.data.files import FileCorpus  # noqa: E402
from sparsecod_mcore.exchange.convert import Request, convert  # noqa: E402
from tests.scoring.conftest import leave_no_process_group  # noqa: E402, F401  a fixture
from tests.scoring.random_models import save_as_megatron  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As jobs have; the same number gives the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Example:
    """A Hugging Face directory with a small Llama of random weights and its tokenizer; questions for it."""

    hugging_face: Path
    tokenizer: Path
    task_data: Path


@pytest.fixture(scope="session")
def example(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Of 2048 tokens, and 160 positions, which long questions exceed. Texts begin with <s>, as in Llama's tokenizer."""
    folder = tmp_path_factory.mktemp("example") / "hf"
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=160,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    path = folder / "tokenizer.json"
    task_data = shared_data / "eval"
    questions = FileCorpus([str(task_data / "arc_easy_test.jsonl.gz")], text_key="question")
    train_tokenizer(questions, path, vocabulary_size=2047)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 2047)])
    tokenizer.save(str(path))
    return Example(folder, path, task_data)


@pytest.fixture(scope="session")
def checkpoint(example: Example) -> Path:
    """The same weights as a torch_dist checkpoint, without a tokenizer."""
    folder = example.hugging_face.with_name("torch_dist")
    save_as_megatron(example.hugging_face, folder)
    return folder


@pytest.fixture(scope="session")
def exported(example: Example, checkpoint: Path) -> Example:
    """What this project makes of that checkpoint for `transformers`."""
    folder = checkpoint.with_name("exported")
    convert(Request(model=checkpoint, out=folder, tokenizer=example.tokenizer))
    return replace(example, hugging_face=folder)
