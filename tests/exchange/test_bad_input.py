"""What a user can get wrong: exit code 2, one sentence that names the tensor or the file, and nothing left behind."""

import errno
import json
import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecod_mcore.exchange import torch_dist
from sparsecod_mcore.exchange.convert import Request, convert
from sparsecod_mcore.exchange.hugging_face import HuggingFaceModel
from sparsecod_mcore.exchange.megatron import find_model
from sparsecod_mcore.exchange.weights import Weight
from tests.distributed.jobs import REPOSITORY
from tests.exchange import families

TOOL = str(REPOSITORY / "tools" / "convert_checkpoint.py")
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Hugging Face's, `hf`, and the checkpoint made of it, `megatron`."""
    folder = tmp_path_factory.mktemp("fine")
    families.random_model("llama").save_pretrained(folder / "hf")
    convert(Request(model=folder / "hf", out=folder / "megatron"))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Q = "model.layers.1.self_attn.q_proj.weight"
# Of a copy of the model: what is done to it, further flags, and what is said.
HUGGING_FACE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut short": (lambda folder: cut(folder / FILE), "", f"hf/{FILE} is no whole safetensors file"),
    "a tensor is missing": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(Q)),
        "",
        f"hf lacks the tensor {Q}",
    ),
    "a tensor too many": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update(extra=torch.ones(1))),
        "",
        f"{FILE} has a tensor extra, which its config.json does not account for",
    ),
    "another shape": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({Q: torch.ones(4, 4)})),
        "",
        f"{FILE}: {Q} has the shape [4, 4], config.json implies [48, 32]",
    ),
    "unknown architecture": (
        lambda folder: edit_config(folder, model_type="lama"),
        "",
        "model_type 'lama' is not supported, llama, mistral, qwen2, qwen3, mixtral, olmoe, qwen2_moe are (did you mean",
    ),
    "a type that is not read": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({Q: tensors[Q].to(torch.float8_e4m3fn)})),
        "",
        f"{FILE}: {Q} is of type F8_E4M3; F32, BF16, F16 are read",
    ),
    "two types in one": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({Q: tensors[Q].bfloat16()})),
        "",
        f"hf has {Q} of type BF16 and model.layers.1.self_attn.v_proj.weight of type F32, which Megatron keeps in one",
    ),
    "tied, with an output": (
        lambda folder: edit_config(folder, tie_word_embeddings=True),
        "",
        f"{FILE}: lm_head.weight differs from model.embed_tokens.weight, to which config.json ties it",
    ),
    "untied, without an output": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight")),
        "",
        "hf lacks the tensor lm_head.weight, and its config.json does not tie it",
    ),
    "a theta": (
        lambda folder: edit_config(folder, rope_parameters=None, rope_theta="abc"),
        "",
        "rope_theta of the rotary embedding is 'abc', not a number above 0",
    ),
    "two files of the same": (
        lambda folder: shutil.copy((folder / FILE).rename(folder / "old.safetensors"), folder / "older.safetensors"),
        "",
        "older.safetensors both hold the tensor",
    ),
    "no tokenizer": (lambda folder: None, "--tokenizer nowhere", "the tokenizer nowhere cannot be read"),
    "the same kind": (lambda folder: None, "--to hf", "hf is a Hugging Face directory already, and --to hf is given"),
    "a size": (lambda folder: None, "--max-shard-size 5XB", "a size of '5XB' is given; a number with KB, MB,"),
    "a type": (lambda folder: None, "--dtype float99", "invalid choice: 'float99'"),
}
MEGATRON: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut short": (lambda folder: cut(folder / "release" / "__0_0.distcp"), "", "release/__0_0.distcp has "),
    "gone": (lambda folder: (folder / "release" / "__0_0.distcp").unlink(), "", "release/__0_0.distcp is missing"),
    "another model's config": (
        lambda folder: edit_config(folder / "hugging_face", rms_norm_eps=1e-3),
        "",
        "hugging_face/config.json does not describe the model that",
    ),
    "the same kind": (lambda folder: None, "--to megatron", "megatron is a torch_dist checkpoint already"),
}
MISTAKES = {
    f"{kind}: {mistake}": (kind, *entry)
    for kind, mistakes in (("hf", HUGGING_FACE), ("megatron", MEGATRON))
    for mistake, entry in mistakes.items()
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_sentence(
    mistake: str, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, spoil, flags, complaint = MISTAKES[mistake]
    shutil.copytree(fine / kind, tmp_path / kind)
    spoil(tmp_path / kind)
    words = [TOOL, "--model", str(tmp_path / kind), "--out", str(tmp_path / "out"), *flags.split()]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(TOOL, run_name="__main__")
    sentences = re.findall(r"^error: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert end.value.code == 2 and len(sentences) == 1 and complaint in sentences[0], sentences
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_what_is_there_is_neither_replaced_nor_removed(fine: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").touch()
    for out, complaint in (("link", "is a link or a mount"), ("out", "out.tmp exists: another run is writing it")):
        with pytest.raises(ValueError, match=complaint):
            convert(Request(model=fine / "hf", out=tmp_path / out))
    assert (tmp_path / "out.tmp" / "mine").exists() and (tmp_path / "link").is_symlink()


def test_a_tensor_of_a_checkpoint_is_missing(fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out when it is written: a checkpoint that lost one cannot be made by hand."""
    write = torch_dist.write_checkpoint
    lost = "decoder.layers.2.mlp.linear_fc2.weight"

    def without(folder: Path, weights: list[Weight], *others: object) -> None:
        write(folder, [weight for weight in weights if weight.names != (lost,)], *others)

    monkeypatch.setattr("sparsecod_mcore.exchange.convert.write_checkpoint", without)
    convert(Request(model=fine / "hf", out=tmp_path / "lossy"))
    with pytest.raises(ValueError, match=f"lossy/release lacks the tensor {lost}"):
        convert(Request(model=tmp_path / "lossy", out=tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_what_is_there_is_left_alone(fine: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="out exists already; name a folder that does not, or an empty one"):
        convert(Request(model=fine / "hf", out=tmp_path / "out"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]
    (tmp_path / "out" / "notes").unlink()
    convert(Request(model=fine / "hf", out=tmp_path / "out"))
    assert (tmp_path / "out" / "release" / "metadata.json").exists()


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_an_interrupted_conversion_leaves_nothing(
    kind: str, by: signal.Signals, fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    reader = HuggingFaceModel if kind == "hf" else torch_dist.CheckpointTensors
    read = reader.read
    reads: list[Weight] = []

    def interrupted(self: object, weight: Weight, *others: object) -> torch.Tensor:
        reads.append(weight)
        if len(reads) == 5:
            assert list(tmp_path.iterdir()) == [tmp_path / "out.tmp"]
            signal.raise_signal(by)
        return read(self, weight, *others)

    monkeypatch.setattr(reader, "read", interrupted)
    with pytest.raises(KeyboardInterrupt if by is signal.SIGINT else SystemExit) as stop:
        convert(Request(model=fine / kind, out=tmp_path / "out"))
    assert len(reads) == 5 and not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before
    assert str(stop.value) == (
        f"{tmp_path / 'out'} is not made, and nothing is left of it" if by is signal.SIGINT else "143"
    )


def test_what_cannot_be_written_is_named(fine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part.safetensors")

    monkeypatch.setattr("sparsecod_mcore.exchange.convert.write_sharded", full)
    with pytest.raises(ValueError, match=r"out cannot be made \(No space left on device: part.safetensors\)"):
        convert(Request(model=fine / "megatron", out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_hugging_face_s_own_metadata_is_no_checkpoint(fine: Path, tmp_path: Path) -> None:
    shutil.copytree(fine / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "metadata.json").write_text("{}")
    assert find_model(tmp_path / "hf") is None
