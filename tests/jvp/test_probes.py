"""Probes and exact Jacobians of random layers against the whole Jacobian, in float64."""

import pytest
import torch
from torch import Tensor

from sparsecod_mcore.jvp import Dual, directions, exact, layer_branches
from sparsecod_mcore.jvp.directions import Noise, Place, place_of_this_rank
from sparsecod_mcore.jvp.exact import deviation_sums
from sparsecod_mcore.jvp.layer import probe_branches
from sparsecod_mcore.jvp.probes import STREAMS, Probing, probe_layer
from sparsecod_mcore.jvp.statistics import jacobian_statistics, reduce_over_ranks
from tests.jvp.models import GQA, MOE, SHARED_EXPERT, random_model

S, B, D = 6, 2, 16


MODELS = {
    "dense": GQA,
    "moe": MOE | SHARED_EXPERT,
    "layer_norm": {"normalization": "LayerNorm", "add_bias_linear": True},
}


@pytest.fixture(params=MODELS)
def layer(request: pytest.FixtureRequest) -> torch.nn.Module:
    return random_model(**MODELS[request.param]).decoder.layers[0]


def hidden_states() -> Tensor:
    return torch.randn(S, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 2


def whole_jacobian(layer: torch.nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Of each stream, J - I as [S, B, D, S, B, D], a column for each element of the input."""
    unit = torch.eye(hidden.numel(), dtype=torch.float64).view(-1, *hidden.shape)
    attention, mlp = (
        branch.tangents.permute(1, 2, 3, 0).unflatten(-1, hidden.shape)
        for branch in layer_branches(layer, Dual(hidden, unit))
    )
    return {"jacobian": attention + mlp, "jacobian_attention": attention, "jacobian_mlp": mlp}


def noise(iteration: int = 1) -> Noise:
    return Noise(1234, iteration, 0, torch.device("cpu"), torch.float64)


def test_exact_sums_are_those_of_the_whole_jacobian(layer: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "TOKENS_AT_ONCE", 5 * S * B)  # batches of unlike sizes
    hidden = hidden_states()
    expected = whole_jacobian(layer, hidden)["jacobian"].sum((0, 1, 3, 4))  # over tokens out and tokens in
    found = deviation_sums(layer, hidden)
    torch.testing.assert_close(found.T, expected, rtol=1e-9, atol=1e-9)


def test_probed_branches_are_those_of_the_layer(layer: torch.nn.Module) -> None:
    hidden = hidden_states()
    shared, own = torch.randn(3, D, dtype=torch.float64), torch.randn(2, S, B, D, dtype=torch.float64)
    probed = probe_branches(layer, hidden, shared, own)
    tangents = torch.cat([shared[:, None, None].expand(-1, S, B, -1), own])
    branches = layer_branches(layer, Dual(hidden, tangents))
    for branch, sums, rest in zip(branches, probed[:2], probed[2:], strict=True):
        torch.testing.assert_close(sums, branch.tangents[:3].sum((1, 2)))
        torch.testing.assert_close(rest, branch.tangents[3:])


def test_statistics_are_unbiased_and_know_their_error(layer: torch.nn.Module) -> None:
    """Of many probes: each within four of its own standard errors of the truth, and the error is not a guess."""
    hidden, num_probes = hidden_states(), 3000
    truth = whole_jacobian(layer, hidden)
    probing = Probing(num_probes, num_sequences=B, along_residual=True)
    sums = probing.zeros(1, D, B, torch.device("cpu"))
    probe_layer(layer, hidden, None, probing, noise(), place_of_this_rank(S, B, False), sums)
    statistics = jacobian_statistics(*reduce_over_ranks(sums, S, replicated=False), along_residual=True)
    for stream in STREAMS:
        deviation = truth[stream]
        mean = deviation.sum((0, 1, 3, 4)) / (S * B)
        along = torch.einsum("sbdtce,tce->sbd", deviation, hidden)
        expected = {
            "deviation": mean.norm() / D,
            "diagonal": 1 + mean.trace() / D,
            "token_deviation": deviation.square().sum() / (S * B) / D,
        }
        for name, value in expected.items():
            found, error = statistics[stream, name], statistics[stream, f"{name}_error"]
            assert 0 < error < 0.1 * value.abs(), (stream, name)
            assert (found - value).abs() < 4 * error, (stream, name, found, value, error)
        gain = 1 + (hidden * along).sum() / hidden.square().sum()
        torch.testing.assert_close(statistics[stream, "residual_gain"].squeeze(), gain)
        change = along.norm() / hidden.norm()
        torch.testing.assert_close(statistics[stream, "residual_change"].squeeze(), change)


def test_a_single_probe_has_no_error_and_is_a_number_all_the_same() -> None:
    layer = random_model().decoder.layers[0]
    probing = Probing(1, num_sequences=B)
    sums = probing.zeros(2, D, B, torch.device("cpu"))
    probe_layer(layer, hidden_states(), None, probing, noise(), place_of_this_rank(S, B, False), sums)
    statistics = jacobian_statistics(*reduce_over_ranks(sums, S, replicated=False), along_residual=False)
    assert statistics["jacobian", "deviation"][0].isfinite()
    assert statistics["jacobian", "deviation_error"][0].isnan()
    assert statistics["jacobian", "deviation"][1].isnan(), "a layer that was not probed has no deviation"


def test_noise_belongs_to_its_token_whoever_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Place(0, S, torch.arange(S))
    monkeypatch.setattr(directions, "BLOCK", 4)
    everything = noise().own(0, whole, 4, D)
    part = noise().own(0, Place(2, S, torch.tensor([1, 4])), 2, D)
    assert torch.equal(part, everything[[1, 4]][:, 2:])
    assert not torch.equal(noise().own(1, whole, 4, D), everything)
    assert not torch.equal(noise(2).shared(3, D), noise().shared(3, D))
    assert abs(everything.mean()) < 0.3 and abs(everything.std() - 1) < 0.2


def test_half_precision_holds_many_tokens() -> None:
    """What sums over 16384 tokens to more than float16 can hold."""
    layer = random_model(dtype=torch.float32).decoder.layers[0]
    hidden = torch.randn(512, 32, D) + 1
    shared = torch.ones(1, D)
    expected = probe_branches(layer, hidden, shared)
    found = probe_branches(layer.half(), hidden.half(), shared.half())
    assert expected.mlp_sums.abs().max() > torch.finfo(torch.float16).max
    error = (found.mlp_sums - expected.mlp_sums).norm() / expected.mlp_sums.norm()
    assert error < 0.01
