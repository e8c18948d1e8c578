"""A trained model's Jacobians, against those that an independent implementation found in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.jvp.directions import Noise, place_of_this_rank  # noqa: E402
from sparsecod_mcore.jvp.exact import deviation_sums  # noqa: E402
from sparsecod_mcore.jvp.probes import Probing, probe_layer  # noqa: E402
from sparsecod_mcore.jvp.statistics import jacobian_statistics, reduce_over_ranks  # noqa: E402
from sparsecod_mcore.scoring.stack import Stack, load_stack  # noqa: E402

SEQUENCES, PROBES, AT_ONCE = 8, 4096, 32


@pytest.fixture(scope="module")
def stack(shared_data: Path) -> Stack:
    return load_stack(shared_data / "stories260k")


@pytest.fixture(scope="module")
def inputs(shared_data: Path, stack: Stack) -> list[torch.Tensor]:
    """What enters each layer, of the sequences that the expected Jacobians are of."""
    tokens = torch.from_numpy(np.load(shared_data / "stories260k" / "tokens.npy")[:SEQUENCES, :-1].astype(np.int64))
    hidden = [stack.embed(tokens)]
    for layer in range(stack.num_layers - 1):
        hidden.append(stack.layer(layer, hidden[-1]))
    return hidden


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> list[dict[str, float]]:
    scores = json.loads((shared_data / "stories260k" / "expected_scores.json").read_text())
    assert scores["jacobian"]["sequences"] == SEQUENCES
    return scores["jacobian"]["layers"]


def test_exact_jacobians(stack: Stack, inputs: list[torch.Tensor], expected: list[dict[str, float]]) -> None:
    width = stack.hidden_size
    for layer, hidden in enumerate(inputs):
        sums = deviation_sums(stack.layers[layer], hidden, stack.rotary_embedding(hidden.shape[0]))
        deviation = sums.T / hidden[..., 0].numel()
        jacobian = deviation + torch.eye(width)
        off_diagonal = (deviation - deviation.diagonal().diag()).norm() / (width**2 - width) ** 0.5
        found = {
            "deviation": deviation.norm() / width,
            "off_diagonal": off_diagonal,
            "diagonal_mean": jacobian.diagonal().mean(),
            "diagonal_std": jacobian.diagonal().std(),
            "frobenius": jacobian.norm(),
            "spectral": torch.linalg.matrix_norm(jacobian, 2),
        }
        for name, value in expected[layer].items():
            assert abs(found[name].item() - value) <= 1e-4 * abs(value), (layer, name, found[name], value)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_probes_agree_within_their_own_error(
    stack: Stack, inputs: list[torch.Tensor], expected: list[dict[str, float]]
) -> None:
    """4096 probes, a few at a time, as training takes them."""
    agree(stack, inputs, expected, PROBES)


def test_some_probes_agree_within_their_own_error(
    stack: Stack, inputs: list[torch.Tensor], expected: list[dict[str, float]]
) -> None:
    agree(stack, inputs, expected, 128)


def agree(stack: Stack, inputs: list[torch.Tensor], expected: list[dict[str, float]], num_probes: int) -> None:
    width = stack.hidden_size
    probing = Probing(num_probes, num_sequences=num_probes)
    device = torch.device("cpu")
    for layer, hidden in enumerate(inputs):
        length = hidden.shape[0]
        sums = probing.zeros(stack.num_layers, width, SEQUENCES, device)
        few = Probing(AT_ONCE, num_sequences=num_probes)
        for first in range(0, num_probes, AT_ONCE):
            part = few.zeros(stack.num_layers, width, SEQUENCES, device)
            noise = Noise(1, first, layer, device, torch.float32)
            rotary = stack.rotary_embedding(length)
            place = place_of_this_rank(length, SEQUENCES, False)
            probe_layer(stack.layers[layer], hidden, rotary, few, noise, place, part)
            sums.shared_LRPD[:, :, first : first + AT_ONCE] = part.shared_LRPD
            sums.products_LRP[:, :, first : first + AT_ONCE] = part.products_LRP
            sums.tokens_L[:] = part.tokens_L
        statistics = jacobian_statistics(*reduce_over_ranks(sums, length, replicated=False), along_residual=False)
        for ours, theirs in (("deviation", "deviation"), ("diagonal", "diagonal_mean")):
            found, error = (statistics["jacobian", name][layer].item() for name in (ours, f"{ours}_error"))
            value = expected[layer][theirs]
            assert 0 < error < 0.1 * value
            assert abs(found - value) <= 3 * error, (layer, ours, found, value, error)
