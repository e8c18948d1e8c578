"""Checkpoints of every parallel layout are the same model."""

import subprocess
from pathlib import Path

import pytest
import torch

from sparsecod_mcore.exchange.convert import Request, convert
from tests.distributed.jobs import TORCHRUN, environment
from tests.exchange import families
from tests.exchange.test_round_trip import TOKENS, assert_same_tensors

pytestmark = pytest.mark.distributed

# Tensor, pipeline and expert parallel sizes.
LAYOUTS = {
    "qwen2": ["2:1:1"],
    "olmoe": ["2:1:1", "1:2:1", "1:1:2"],
    "qwen2_moe": ["1:2:1", "1:1:2"],
}


def test_layouts_convert_to_the_same_files(tmp_path: Path) -> None:
    """The layers of the first two are one tensor in Megatron's checkpoint, those of the third are not."""
    torch.save(TOKENS, tmp_path / "tokens.pt")
    expected, jobs = {}, {}
    for family, layouts in LAYOUTS.items():
        model = families.random_model(family)
        model.save_pretrained(tmp_path / family)
        expected[family] = families.logits(model, TOKENS)
        for layout in layouts:
            jobs[f"{family}-{layout.replace(':', '')}"] = (family, layout)
    words = [*TORCHRUN, "--nproc-per-node", "2", str(Path(__file__).with_name("layouts_job.py")), str(tmp_path)]
    words += [f"{name}:{layout}={tmp_path / family}" for name, (family, layout) in jobs.items()]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    files: dict[str, dict[str, bytes]] = {}
    for name, (family, layout) in jobs.items():
        out = tmp_path / f"{name}.hf"
        convert(Request(model=tmp_path / name, out=out))
        contents = {file.name: file.read_bytes() for file in out.iterdir()}
        assert files.setdefault(family, contents) == contents
        assert_same_tensors(out, tmp_path / family)
        assert torch.equal(families.logits(families.load(out), TOKENS), expected[family])
        found = tmp_path / f"{name}.logits.pt"
        assert found.exists() == (layout.split(":")[1] == "1")
        if found.exists():
            torch.testing.assert_close(torch.load(found), expected[family], rtol=1e-4, atol=1e-4)
