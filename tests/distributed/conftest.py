"""A small real dataset, and trained checkpoints that layouts start from."""

from pathlib import Path

import pytest

from sparsecod_mcore.data import DocstringCorpus, LimitedCorpus, preprocess, train_tokenizer
from tests.distributed.jobs import TINY, TINY_MOE, Data, train


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Docstrings of 120 modules of the standard library, with a BPE of 512 tokens trained on them."""
    folder = tmp_path_factory.mktemp("data")
    corpus = LimitedCorpus(DocstringCorpus(workers=1), 120)
    train_tokenizer(corpus, folder / "tokenizer.json", 512)
    preprocess(corpus, folder / "docs", folder / "tokenizer.json", valid_fraction=0.1, workers=1)
    return Data(folder / "docs", folder / "tokenizer.json")


@pytest.fixture(scope="session")
def dense_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def moe_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny_moe.yaml"
    path.write_text(TINY_MOE + TINY)
    return path


# Fresh initialisation differs between layouts: parity is judged from the weights of one checkpoint.
FROM_WEIGHTS = ("--finetune", "--no-load-optim", "--no-load-rng")


def _start(tmp: Path, config: Path, data: Data) -> tuple[object, ...]:
    train(tmp, config, data, "--exit-interval", 2, "--save-interval", 1000)
    return ("--load", tmp / "checkpoints", *FROM_WEIGHTS)


@pytest.fixture(scope="session")
def dense_start(tmp_path_factory: pytest.TempPathFactory, dense_config: Path, data: Data) -> tuple[object, ...]:
    """Flags that start a job from a dense model trained for two steps."""
    return _start(tmp_path_factory.mktemp("dense_start"), dense_config, data)


@pytest.fixture(scope="session")
def moe_start(tmp_path_factory: pytest.TempPathFactory, moe_config: Path, data: Data) -> tuple[object, ...]:
    """Flags that start a job from a MoE model trained for two steps."""
    return _start(tmp_path_factory.mktemp("moe_start"), moe_config, data)
