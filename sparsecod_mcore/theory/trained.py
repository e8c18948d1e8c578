"""What the theorems assume, looked for in a trained model: independent weights, uniform attention, uniform gates.

Axes: S positions, B sequences, D width, N heads, G key-value heads, H head width, T keys, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.model.residual import ADDS_PER_LAYER, ATTENTION_ADD, MLP_ADD, bind_residual_adds
from sparsecod_mcore.monitor.buffer import MomentsBuffer
from sparsecod_mcore.scoring.provenance import hash_files, hash_tokens
from sparsecod_mcore.scoring.sequences import check_sequences, load_sequences
from sparsecod_mcore.scoring.stack import Stack, load_stack, model_files
from sparsecod_mcore.theory.checks import Case, Claim
from sparsecod_mcore.theory.monte_carlo import Estimate, Values, mean_of, mean_ratio
from sparsecod_mcore.theory.results import Check

SHUFFLES = 16
RANDOM_SEQUENCES, LONGEST = 16, 256

type Pair = tuple[Values, Values]  # sums of one sequence each, [B], whose ratio is wanted


class Comparison:
    """A model, and tokens for it to run on."""

    def __init__(self, model: str, data: str | None, seed: int) -> None:
        """`data` as `load_sequences` takes it; None for random tokens. Raises `UserError` for what cannot be used."""
        self._stack, self._seed = load_stack(Path(model)), seed
        length = min(LONGEST, self._stack.max_positions)
        if data is None:
            shape = (RANDOM_SEQUENCES, length + 1)
            tokens_BT = np.random.default_rng(seed).integers(self._stack.vocab_size, size=shape)
        else:
            is_array = data.endswith(".npy")  # whose sequences may be shorter
            tokens_BT = load_sequences(data, length=None if is_array else length)[:, : length + 1]
            if len(tokens_BT) < 2:
                raise UserError(f"{data} has one sequence; two or more tell how far they scatter")
        self._tokens_BT = check_sequences(tokens_BT, self._stack, str(data))
        self.model_sha256 = hash_files(model_files(Path(model)))
        self.data_sha256 = hash_tokens(tokens_BT)

    def checks(self) -> Iterator[Check]:
        return checks(self._stack, self._tokens_BT[:, :-1], self._seed)


@torch.no_grad()
def checks(stack: Stack, tokens_BS: Tensor, seed: int) -> Iterator[Check]:
    """Compare `stack`, running on `tokens_BS`, with what the theorems assume; sequences count as independent."""
    hidden_SBD = stack.embed(tokens_BS.to(stack.device))
    with _watched_attention(stack) as attention, _watched_routers(stack, tokens_BS.shape[0]) as routers:
        energies = _energies(stack, hidden_SBD)
    yield from _independence(stack, hidden_SBD, energies, seed)
    predicted = "in units of σ²/n"
    for index, (name, claim, violated) in enumerate(
        (
            ("weights of trained attention", "n Σ_j A_ij² = 1", "weights are uniform"),
            ("outputs of trained attention", f"Var = σ²/n ({predicted})", "weights are uniform, values independent"),
        )
    ):
        of_layers = {layer: pairs[index] for layer, pairs in attention.items()}
        yield _by_layer(Claim(theorem=4, name=name, claim=claim, violated=violated, varied="layer"), of_layers)
    if routers:
        gates = Claim(
            theorem=6,
            name="gates of a trained router",
            claim="k Σ g² = (Σ g)²",
            violated="gates are 1/k",
            varied="layer",
        )
        yield _by_layer(gates, routers)


def _by_layer(claim: Claim, pairs: dict[int, Pair]) -> Check:
    return claim.judge(
        [Case({"layer": layer}, 1.0, _not_drawn) for layer in pairs], [mean_ratio(*pair) for pair in pairs.values()]
    )


def _not_drawn(*_: object) -> Values:
    raise AssertionError("a trained model is measured, not drawn")


def _independence(
    stack: Stack, hidden_SBD: Tensor, energies: dict[tuple[int, int], Pair], seed: int
) -> Iterator[Check]:
    """Whether E‖h + f‖² = E‖h‖² + E‖f‖², of the trained weights and of the same numbers in random order."""
    cases = [Case({"layer": layer, "branch": add}, 1.0, _not_drawn) for layer, add in energies]
    sums = "E‖h+f‖² = E‖h‖² + E‖f‖²"
    trained = Claim(
        theorem=1,
        name="trained weights",
        claim=f"{sums} (their ratio is 1)",
        violated="W is independent of h and of mean 0",
        varied="layer",
    )
    yield trained.judge(cases, [mean_ratio(*pair) for pair in energies.values()])
    rng = torch.Generator().manual_seed(seed)
    of_shuffles: list[list[float]] = []
    for _ in range(SHUFFLES):
        with _shuffled_weights(stack, rng):
            pairs = _energies(stack, hidden_SBD).values()
        of_shuffles.append([float(sums_B.sum() / parts_B.sum()) for sums_B, parts_B in pairs])
    shuffled = Claim(theorem=1, name="trained weights, shuffled", claim=f"{sums} (their ratio is 1)", varied="layer")
    yield shuffled.judge(cases, _means(of_shuffles))


def _means(rows: list[list[float]]) -> list[Estimate]:
    return [mean_of(column.numpy()) for column in torch.tensor(rows, dtype=torch.float64).T.contiguous()]


def _energies(stack: Stack, hidden_SBD: Tensor) -> dict[tuple[int, int], Pair]:
    """‖h + f‖² and ‖h‖² + ‖f‖² of each sequence, by layer and branch."""
    branches: list[Tensor] = []
    buffer = MomentsBuffer(1, stack.num_layers, stack.device)
    buffer.begin(0)
    bind_residual_adds(
        [stack.model], buffer, in_evaluation=True, observe=lambda layer, add, branch: branches.append(branch.double())
    )
    energies: dict[tuple[int, int], Pair] = {}
    try:
        for layer in range(stack.num_layers):
            h_SBD = hidden_SBD.double()
            hidden_SBD = stack.layer(layer, hidden_SBD)
            for add in (ATTENTION_ADD, MLP_ADD):
                f_SBD = branches[layer * ADDS_PER_LAYER + add]
                energies[layer, add] = _energy(h_SBD + f_SBD), _energy(h_SBD) + _energy(f_SBD)
                h_SBD = h_SBD + f_SBD
    finally:
        bind_residual_adds([stack.model], None)
    return energies


def _energy(x_SBD: Tensor) -> Values:
    return x_SBD.square().sum((0, 2)).cpu().numpy()


@contextmanager
def _shuffled_weights(stack: Stack, rng: torch.Generator) -> Iterator[None]:
    """Every weight matrix of the layers with its entries in random order: the same sizes, and nothing learned."""
    weights = [weight for weight in stack.model.decoder.layers.parameters() if weight.dim() > 1]
    kept = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            order = torch.randperm(weight.numel(), generator=rng).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)


@contextmanager
def _watched_attention(stack: Stack) -> Iterator[dict[int, tuple[Pair, Pair]]]:
    """By layer, of each sequence: n_i Σ_j A_ij² and 1; n_i ‖o_i‖² and the mean ‖v_j‖² that query i sees; summed."""
    found: dict[int, tuple[Pair, Pair]] = {}

    def watch(layer: int) -> Any:
        def measure(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            q_SBNH, k_TBGH, v_TBGH = (x.double() for x in args[:3])
            found[layer] = _attention_sums(q_SBNH, k_TBGH, v_TBGH, module.softmax_scale)

        return measure

    handles = [
        layer.self_attention.core_attention.register_forward_pre_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(stack.layers)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _attention_sums(q_SBNH: Tensor, k_TBGH: Tensor, v_TBGH: Tensor, scale: float | None) -> tuple[Pair, Pair]:
    length, heads = q_SBNH.shape[0], q_SBNH.shape[2]
    q_BNSH, k_BNTH, v_BNTH = (
        x.repeat_interleave(heads // x.shape[2], 2).permute(1, 2, 0, 3) for x in (q_SBNH, k_TBGH, v_TBGH)
    )
    scores_BNST = q_BNSH @ k_BNTH.mT * (q_SBNH.shape[-1] ** -0.5 if scale is None else scale)
    hidden_ST = torch.ones(length, length, device=q_SBNH.device).triu(1).bool()
    weights_BNST = scores_BNST.masked_fill(hidden_ST, -torch.inf).softmax(-1)
    keys_S = torch.arange(1.0, length + 1, dtype=torch.float64, device=q_SBNH.device)
    concentration_BNS = keys_S * weights_BNST.square().sum(-1)
    outputs_BNS = keys_S * (weights_BNST @ v_BNTH).square().sum(-1)
    values_BNS = v_BNTH.square().sum(-1).cumsum(-1) / keys_S

    def total(x_BNS: Tensor) -> Values:
        return x_BNS.sum((1, 2)).cpu().numpy()

    return (total(concentration_BNS), total(torch.ones_like(concentration_BNS))), (
        total(outputs_BNS),
        total(values_BNS),
    )


@contextmanager
def _watched_routers(stack: Stack, sequences: int) -> Iterator[dict[int, Pair]]:
    """By layer that has experts, of each sequence: k Σ g² and (Σ g)² of the gates of a token, summed over tokens."""
    found: dict[int, Pair] = {}

    def watch(layer: int) -> Any:
        def measure(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
            gates_SBE = output[0].double().view(-1, sequences, output[0].shape[-1])
            k_SB = output[1].view_as(gates_SBE).sum(-1)
            pair = k_SB * gates_SBE.square().sum(-1), gates_SBE.sum(-1).square()
            found[layer] = pair[0].sum(0).cpu().numpy(), pair[1].sum(0).cpu().numpy()

        return measure

    handles = [
        layer.mlp.router.register_forward_hook(watch(index))
        for index, layer in enumerate(stack.layers)
        if hasattr(layer.mlp, "router")
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
