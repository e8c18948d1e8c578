"""Hugging Face to torch_dist and back: the same function, the same tensors, the same text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsecod_mcore.exchange.convert import Request, convert
from tests.exchange import families, megatron_side
from tests.exchange.families import FAMILIES, SIZES

TOKENS = torch.randint(3, SIZES["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(1))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    a, b = tensors(found), tensors(expected)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype and torch.equal(a[name], tensor), name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    """With several files in and out; what save_pretrained wrote is what comes back."""
    model = families.random_model(name)
    there, megatron, back = tmp_path / "there", tmp_path / "megatron", tmp_path / "back"
    model.save_pretrained(there, max_shard_size="20KB")
    convert(Request(model=there, out=megatron))
    expected = families.logits(model, TOKENS)
    assert expected.std() > 0.1
    for folder in (there, megatron):
        found = megatron_side.logits(folder, TOKENS, SIZES["vocab_size"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    convert(Request(model=megatron, out=back, max_shard_size=30_000))
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 1
    assert all(file.stat().st_size < 33_000 for file in back.glob("*.safetensors"))
    assert_same_tensors(back, there)
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (back, there))
    assert config == original
    again = families.load(back)
    assert torch.equal(families.logits(again, TOKENS), expected)
    assert families.continuation(again, TOKENS) == families.continuation(model, TOKENS)


def test_the_real_model(tmp_path: Path, shared_data: Path) -> None:
    """Its loss at every stage is that of the reference."""
    there, megatron, back = shared_data / "stories260k", tmp_path / "megatron", tmp_path / "back"
    tokens = torch.from_numpy(np.load(there / "tokens.npy").astype(np.int64))
    convert(Request(model=there, out=megatron))
    convert(Request(model=megatron, out=back))
    assert_same_tensors(back, there)
    for folder in (there, megatron, back):
        assert megatron_side.mean_loss(folder, tokens) == pytest.approx(1.3156, abs=5e-5)
    logits_BSV = families.logits(families.load(back), tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(1.3156, abs=5e-5)
    assert (back / "generation_config.json").read_bytes() == (there / "generation_config.json").read_bytes()


def test_types(tmp_path: Path) -> None:
    """bfloat16 is kept, or asked for; config.json says which."""
    model = families.random_model("olmoe").to(torch.bfloat16)
    there = tmp_path / "there"
    model.save_pretrained(there)
    convert(Request(model=there, out=tmp_path / "kept"))
    convert(Request(model=tmp_path / "kept", out=tmp_path / "back"))
    assert_same_tensors(tmp_path / "back", there)
    convert(Request(model=tmp_path / "kept", out=tmp_path / "wide", dtype=torch.float32))
    convert(Request(model=there, out=tmp_path / "wide_first", dtype=torch.float32))
    convert(Request(model=tmp_path / "wide_first", out=tmp_path / "narrow", dtype=torch.bfloat16))
    assert_same_tensors(tmp_path / "narrow", there)
    wide = tensors(tmp_path / "wide")
    for name, tensor in tensors(there).items():
        assert wide[name].dtype == torch.float32 and torch.equal(wide[name], tensor.float())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    assert families.load(tmp_path / "wide").dtype == torch.float32
