"""What a user can get wrong: exit code 2 and one sentence, before anything is computed."""

import io
import json
import os
import pickle
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparsecod_mcore.train.checkpoint_metadata import read_metadata
from tests.distributed.jobs import REPOSITORY
from tests.scoring.random_models import GQA, random_tokens, save_random_checkpoint

TOOL = str(REPOSITORY / "tools" / "score_layers.py")
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def hugging_face(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def spoil_a_weight(checkpoint: Path, content: object) -> None:
    """Put `content` in the place of a tensor of a checkpoint."""
    place = max(read_metadata(checkpoint).storage_data.values(), key=lambda place: place.length)
    saved = io.BytesIO()
    torch.save(content, saved)
    with (checkpoint / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(saved.getvalue().ljust(place.length, b"\0"))


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Folders and files, each of which has something wrong with it, and `fine` and `tokens`."""
    sprung = tmp_path / "sprung"
    folder = {name: tmp_path / name for name in ("fine", "one", "trap", "args", "metadata", "none")}
    save_random_checkpoint(GQA, folder["fine"])
    save_random_checkpoint(GQA | {"num_layers": 1}, folder["one"])
    folder["none"].mkdir()
    hugging_face(folder["trap"])
    (folder["trap"] / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    shutil.copytree(folder["fine"], folder["metadata"])
    (folder["metadata"] / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    shutil.copytree(folder["fine"], folder["args"])
    torch.save({"args": Trap(sprung)}, folder["args"] / "common.pt")  # what older checkpoints have
    folder["family"] = hugging_face(tmp_path / "family", model_type="lama")
    folder["biased"] = hugging_face(tmp_path / "biased", attention_bias=True)
    folder["yarn"] = hugging_face(tmp_path / "yarn", rope_scaling={"type": "yarn", "factor": 2.0})
    folder["families"] = hugging_face(tmp_path / "families", model_type=["llama"])
    folder["words"] = hugging_face(tmp_path / "words", num_hidden_layers="2")
    folder["index"] = hugging_face(tmp_path / "index")
    (folder["index"] / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    folder["weights"] = tmp_path / "weights"
    shutil.copytree(folder["fine"], folder["weights"])
    spoil_a_weight(folder["weights"], Trap(sprung))
    folder["lacking"] = hugging_face(tmp_path / "lacking")
    save_file({"model.embed_tokens.weight": torch.zeros(97, 16)}, folder["lacking"] / "model.safetensors")
    folder["cut"] = hugging_face(tmp_path / "cut")
    whole = (folder["lacking"] / "model.safetensors").read_bytes()
    (folder["cut"] / "model.safetensors").write_bytes(whole[:-100])
    tokens = random_tokens(4, 33).numpy()
    files = {"tokens": tokens, "long": random_tokens(2, 140).numpy(), "negative": -1 - tokens, "real": tokens / 2}
    for name, content in (files | {"foreign": tokens // 96 * 97}).items():
        folder[name] = tmp_path / f"{name}.npy"
        np.save(folder[name], content)
    folder["objects"] = tmp_path / "objects.npy"
    np.save(folder["objects"], np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    folder["archive"] = tmp_path / "archive.npy"
    with folder["archive"].open("wb") as file:
        np.savez(file, tokens=tokens)
    return folder


MISTAKES = {
    "no model": ("--model nowhere", "nowhere does not exist; a run's directory, a checkpoint or"),
    "a file": ("--model {tokens}", "is a file; a run's directory"),
    "no checkpoint": ("--model {none}", "is no model: it holds neither a torch_dist checkpoint nor"),
    "a pickle": ("--model {trap}", "pytorch_model.bin is a pickle, which can run code when it is opened"),
    "a pickle as metadata": ("--model {metadata}", ".metadata is refused: it wants posix.mkdir, which"),
    "a pickle as arguments": ("--model {args}", "is refused: a pickle of it is damaged, or holds more than plain"),
    "a pickle as a weight": ("--model {weights}", "is refused: a pickle of it is damaged, or holds more than plain"),
    "a pickle as tokens": ("--data {objects}", "objects.npy is no .npy file of numbers"),
    "an archive as tokens": ("--data {archive}", "archive.npy is no .npy file of numbers"),
    "family": ("--model {family}", "mixtral, olmoe, qwen2_moe are (did you mean 'llama'?)"),
    "families": ("--model {families}", "model_type ['llama'] is not supported, llama, mistral,"),
    "a count in words": ("--model {words}", "config.json: num_hidden_layers is '2', not a whole number of 1 or more"),
    "an index of a list": ("--model {index}", "is damaged: its weight_map does not name a file for each tensor"),
    "bias": ("--model {biased}", "config.json: attention_bias: true is not supported"),
    "rope": ("--model {yarn}", "rope scaling 'yarn' is not supported"),
    "a tensor is missing": ("--model {lacking}", "lacks the tensor model.layers.0.input_layernorm.weight"),
    "cut short": ("--model {cut}", "model.safetensors is no whole safetensors file"),
    "one layer": ("--model {one}", "has one layer; scores compare layers"),
    "no such score": (
        "--scores causal,permutatoin",
        "'permutatoin' is no score (did you mean 'permutation'?); causal,",
    ),
    "no score": ("--scores ,", "no score is named; causal,"),
    "no experts": ("--scores moe", "the score 'moe' is of layers with experts, and this model has none"),
    "outside of the vocabulary": ("--data {foreign}", "token 97, outside of the model's vocabulary of 97"),
    "negative": ("--data {negative}", "holds the token -97, outside"),
    "no integers": ("--data {real}", "holds float64 [4, 33]; integers [sequences, length + 1] are wanted"),
    "no data": ("--data nothing.npy", "nothing.npy cannot be read"),
    "no dataset": ("--data nothing --length 8", "nothing.idx does not exist"),
    "no length": ("--data nothing", "--length is needed to cut nothing into sequences"),
    "longer than positions": ("--data {long}", "sequences of length 139, longer than the model's 128 positions"),
    "too few": ("--sequences 5", "has 4 sequences of length 32, fewer or shorter than the 5 of length 32"),
    "zero": ("--length 0", "--length 0 is given, 1 or more is accepted"),
    "pairs": ("--pairs sample:1", "--pairs sample:1 is given; all, or sample:N with N of 2 or more, is accepted"),
    "budget": ("--memory-budget 0.0001", "a memory budget of 0 MiB does not hold one sequence of length 32"),
    "layout": ("--tensor-parallel-size 2", "1 processes are not divisible by tensor x expert parallel size 2 x 1"),
    "dtype": ("--dtype float99", "invalid choice: 'float99'"),
}


def test_mistakes_are_told_in_one_sentence(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = f"--model {places['fine']} --data {places['tokens']} --out {tmp_path / 'out'}"
    for mistake, (flags, complaint) in MISTAKES.items():
        monkeypatch.setattr(sys, "argv", [TOOL, *usual.split(), *flags.format(**places).split()])
        code = 0
        try:
            runpy.run_path(TOOL, run_name="__main__")
        except SystemExit as end:
            code = end.code
        sentences = re.findall(r"^error: (.*)$", capsys.readouterr().err, re.MULTILINE)
        assert code == 2 and len(sentences) == 1 and complaint in sentences[0], f"{mistake}: {sentences}"
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "out" / "scores.json").exists()
