"""Training from a converted model, and the way of what it saves back to Hugging Face."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparsecod_mcore.exchange.convert import Request, convert
from tests.distributed.jobs import Data, train
from tests.exchange.test_round_trip import assert_same_tensors

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_training_takes_a_converted_model(tmp_path: Path, dense_config: Path, data: Data) -> None:
    """Two steps at tensor parallel size 2 that are too small to change anything; and the run is exported."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 176, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, rms_norm_eps=1e-6)).save_pretrained(tmp_path / "there")
    convert(Request(model=tmp_path / "there", out=tmp_path / "megatron"))
    flags = ("--load", tmp_path / "megatron", "--tensor-model-parallel-size", 2, "--exit-interval", 2)
    job = train(
        tmp_path / "run", dense_config, data, *flags, "--lr", 1e-30, "--min-lr", 0, "--weight-decay", 0, processes=2
    )
    assert list(job.losses()) == [1, 2]
    convert(Request(model=tmp_path / "run", out=tmp_path / "back"))
    assert_same_tensors(tmp_path / "back", tmp_path / "there")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back", local_files_only=True)
    assert tokenizer.decode(tokenizer("def main")["input_ids"]).split() == ["def", "main"]
