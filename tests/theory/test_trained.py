"""What is measured of a model, against float64 on small models whose answer is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.scoring.stack import Stack  # noqa: E402
from sparsecod_mcore.theory import trained  # noqa: E402
from sparsecod_mcore.theory.results import Check  # noqa: E402
from sparsecod_mcore.theory.run import Request, verify  # noqa: E402
from tests.scoring.conftest import leave_no_process_group  # noqa: E402, F401
from tests.scoring.random_models import GQA, MOE, random_stack, random_tokens, save_random_checkpoint  # noqa: E402

TOKENS = random_tokens(4, 20)


def checks(stack: Stack) -> dict[str, Check]:
    return {check.name: check for check in trained.checks(stack, TOKENS, 0)}


def test_equal_scores_are_uniform_attention() -> None:
    """Without queries every visible key weighs the same; with them fewer count than there are."""
    stack = random_stack(GQA)
    assert checks(stack)["weights of trained attention"].verdict == "assumption bites"
    for layer in stack.layers:
        rows_of_groups = layer.self_attention.linear_qkv.weight.data.unflatten(0, (2, 5, 10))  # 3 queries, key, value
        rows_of_groups[:, :3] = 0.0
    check = checks(stack)["weights of trained attention"]
    assert check.verdict == "holds all the same"
    assert [point.measured for point in check.points] == pytest.approx([1.0] * 3, abs=1e-9)


def test_outputs_of_attention_equal_the_models_own() -> None:
    stack = random_stack(GQA)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = stack.layers[1].self_attention.core_attention.register_forward_hook(
        lambda module, args, output: kept.append((args[2].double(), output.double()))
    )
    found = checks(stack)["outputs of trained attention"].points[1].measured
    handle.remove()
    v_TBGH, output_SBD = kept[0]
    keys_S = torch.arange(1.0, 21.0, dtype=torch.float64)
    outputs_SB = output_SBD.square().sum(-1)
    values_SB = 3 * v_TBGH.square().sum((-2, -1)).cumsum(0) / keys_S[:, None]  # 3 query heads see each value
    expected = (keys_S[:, None] * outputs_SB).sum() / values_SB.sum()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_branches_against_the_layers_outputs() -> None:
    stack = random_stack(MOE)
    before = {name: weight.clone() for name, weight in stack.model.named_parameters()}
    found = checks(stack)
    assert all(torch.equal(weight, before[name]) for name, weight in stack.model.named_parameters())
    energies = {tuple(point.parameters.values()): point for point in found["trained weights"].points}
    assert sorted(energies) == [(layer, branch) for layer in range(3) for branch in range(2)]
    hidden_SBD = stack.embed(TOKENS)
    for layer in range(3):
        attended: list[torch.Tensor] = []
        handle = stack.layers[layer].pre_mlp_layernorm.register_forward_pre_hook(
            lambda _, args, attended=attended: attended.append(args[0])
        )
        after_SBD = stack.layer(layer, hidden_SBD)
        handle.remove()
        for branch, (x, y) in enumerate(((hidden_SBD, attended[0]), (attended[0], after_SBD))):
            x, y = x.double(), y.double()
            expected = y.square().sum() / (x.square().sum() + (y - x).square().sum())
            assert energies[layer, branch].measured == pytest.approx(expected.item(), rel=1e-4)
        hidden_SBD = after_SBD
    gates = found["gates of a trained router"].points
    assert [point.parameters["layer"] for point in gates] == [1, 2]
    assert all(1.0 < point.measured <= 2.0 for point in gates)  # of 2 gates, from equal to one alone


def test_aligned_weights_are_told_from_shuffled_ones() -> None:
    """An output projection that undoes that of the values makes a branch along the stream."""
    settings = GQA | {"num_layers": 1, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 12}
    stack = random_stack(settings, std=0.05)
    attention = stack.layers[0].self_attention
    values_GHD = attention.linear_qkv.weight.data.unflatten(0, (4, 3, 12))[:, 2]
    attention.linear_proj.weight.data.copy_(values_GHD.flatten(0, 1).T)
    found = checks(stack)
    assert found["trained weights"].points[0].low > 1.02
    shuffled = found["trained weights, shuffled"].points[0]
    assert abs(shuffled.measured - 1) < 0.01


def test_a_checkpoint_on_random_tokens_and_on_given_ones(tmp_path: Path) -> None:
    save_random_checkpoint(GQA, tmp_path / "model")
    request = {"theorems": (6,), "samples": 100, "model": str(tmp_path / "model")}
    results = verify(Request(**request))
    assert results.model_sha256 is not None and results.data is None and results.data_sha256 is not None
    assert {check.theorem for check in results.checks} == {1, 4, 6}
    for name, tokens in (("one", TOKENS[:1]), ("foreign", TOKENS + 97)):
        np.save(tmp_path / f"{name}.npy", tokens.numpy())
        with pytest.raises(UserError, match=r"one sequence|outside of the model's vocabulary"):
            verify(Request(**request, data=str(tmp_path / f"{name}.npy")))
