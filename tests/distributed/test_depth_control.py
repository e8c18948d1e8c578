"""Remedies against depth train the same model in every layout, and are there again when the model is scored."""

from pathlib import Path

import pytest
import torch

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.model.norm import ScaledNorm  # noqa: E402
from sparsecod_mcore.model.residual import MeasuredResidualAdd  # noqa: E402
from sparsecod_mcore.model.residual_norms import BranchNormResidualAdd, PostNormResidualAdd  # noqa: E402
from sparsecod_mcore.scoring.stack import load_stack  # noqa: E402
from tests.distributed.jobs import Data, assert_same_losses, assert_same_statistics, train  # noqa: E402
from tests.distributed.test_layouts import PP2, SP, TOLERANCE, TP2  # noqa: E402
from tests.scoring.conftest import leave_no_process_group  # noqa: E402, F401

pytestmark = pytest.mark.distributed

# Mix-LN's first 3 of 4 layers, of which the third opens the second pipeline stage.
FLAGS = ("--cod-mix-ln-share", 0.75, "--train-iters", 4)
PLAIN, BRANCH, POST = MeasuredResidualAdd, BranchNormResidualAdd, PostNormResidualAdd
ADDS = {"mix_ln": [POST] * 3 + [PLAIN], "layernorm_scaling": [PLAIN] * 4, "sandwich_norm": [BRANCH] * 4}


@pytest.mark.parametrize(
    "kind", ["mix_ln", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("layernorm_scaling", "sandwich_norm"))]
)
def test_layouts_and_scoring(kind: str, tmp_path: Path, dense_config: Path, data: Data, dense_start: tuple) -> None:
    # No other model has weights for the norms behind branches; drawn on the CPU they are the same in both layouts.
    fresh = kind == "sandwich_norm"
    start = ("--use-cpu-initialization",) if fresh else dense_start
    layout, processes = (TP2 + SP, 2) if fresh else (TP2 + SP + PP2, 4)
    flags = (*start, *FLAGS, "--cod-depth-control", kind)
    one = train(tmp_path / "one", dense_config, data, *flags)
    many = train(tmp_path / "many", dense_config, data, *flags, *layout, processes=processes)
    assert_same_losses(many, one, TOLERANCE)
    assert_same_statistics(many, one, TOLERANCE)

    stacks = [load_stack(run) for run in (one.run, many.run)]
    tokens = torch.arange(48).view(2, 24)
    losses = []
    for stack in stacks:
        assert [type(layer.mlp_bda) for layer in stack.layers] == ADDS[kind]
        scales = [
            layer.input_layernorm.scale for layer in stack.layers if isinstance(layer.input_layernorm, ScaledNorm)
        ]
        assert scales == pytest.approx([n**-0.5 for n in range(1, 5)] if kind == "layernorm_scaling" else [])
        hidden = stack.embed(tokens)
        for layer in range(stack.num_layers):
            hidden = stack.layer(layer, hidden)
        losses.append(stack.losses(hidden, tokens).mean().item())
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
