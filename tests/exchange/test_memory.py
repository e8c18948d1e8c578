"""A conversion needs the memory of single tensors, however many files the model has."""

import json
import re
from pathlib import Path

import pytest
import torch

from sparsecod_mcore.exchange.convert import Request, convert
from sparsecod_mcore.exchange.hugging_face import settings_of
from sparsecod_mcore.exchange.safetensors_file import Group, write_sharded

FILE_SIZE = 24_000_000
SMALL = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 4096,
}
LARGE = SMALL | {"num_hidden_layers": 18}  # 262 MB


def save(folder: Path, config: dict[str, object]) -> Path:
    """A model of ones in files of `FILE_SIZE`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, _, settings = settings_of(folder / "config.json")
    shapes = [weight.tensor_shapes() for weight in family.weights(settings)]

    def ones(of: dict[str, tuple[int, ...]]) -> list[torch.Tensor]:
        return [torch.ones(shape) for shape in of.values()]

    groups = [Group(of, torch.float32, lambda of=of: ones(of)) for of in shapes]
    write_sharded(folder, groups, FILE_SIZE)
    return folder


def status(name: str) -> int:
    """A figure of this process, in bytes."""
    (found,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found) * 1024


def extra_memory(request: Request) -> int:
    """By how much this process grew at most during a conversion; mapped files count."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = status("VmHWM")
    convert(request)
    return status("VmHWM") - before


def test_memory_stays_below_two_files(tmp_path: Path) -> None:
    """What a first conversion sets up, of whatever size, is no part of it."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is known on Linux only")
    small = save(tmp_path / "small", SMALL)
    convert(Request(model=small, out=tmp_path / "small.megatron"))
    convert(Request(model=tmp_path / "small.megatron", out=tmp_path / "small.hf"))
    large = save(tmp_path / "large", LARGE)
    files = list(large.glob("*.safetensors"))
    assert len(files) > 10 and sum(file.stat().st_size for file in files) > 10 * FILE_SIZE
    there = extra_memory(Request(model=large, out=tmp_path / "megatron"))
    back = extra_memory(Request(model=tmp_path / "megatron", out=tmp_path / "back", max_shard_size=FILE_SIZE))
    print(f"extra memory: {there / 1e6:.0f} MB, {back / 1e6:.0f} MB")
    assert there < 2 * FILE_SIZE and back < 2 * FILE_SIZE, (there, back)
    assert (tmp_path / "back" / files[0].name).read_bytes() == files[0].read_bytes()
