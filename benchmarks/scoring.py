"""The scoring engine against the published procedure, done plainly, on the same model with the same results.

Plainly: every intervention is a full forward pass in micro-batches of 4 sequences; each layer's linear substitute has
a pass of its own that collects what goes in and comes out, and one `lstsq` in float64; each layer's Jacobian, over the
first 8 sequences in micro-batches of 2, takes one gradient for every output dimension. Both ways run the same Megatron
layers. They take turns, and ratios are taken within a round, so that a noisy machine harms both alike. Ratios are of
the whole and of its parts: linear fits, Jacobians, and interventions, which are the rest.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from sparsecod_mcore import platform

platform.prepare()  # before anything imports Megatron

import torch  # noqa: E402

from benchmarks.jacobian_matrix import rows_by_backward  # noqa: E402
from benchmarks.measure import machine  # noqa: E402
from sparsecod_mcore.exchange.decoder import decoder_settings  # noqa: E402
from sparsecod_mcore.model.build import build_model, evaluation_arguments  # noqa: E402
from sparsecod_mcore.scoring import engine, parallel, run, usefulness  # noqa: E402
from sparsecod_mcore.scoring.interventions import by_first  # noqa: E402
from sparsecod_mcore.scoring.jacobian import JacobianScore  # noqa: E402
from sparsecod_mcore.scoring.plan import make_plan  # noqa: E402
from sparsecod_mcore.scoring.registry import make_scores  # noqa: E402
from sparsecod_mcore.scoring.score import Options  # noqa: E402
from sparsecod_mcore.scoring.stack import Stack  # noqa: E402
from sparsecod_mcore.scoring.work_file import WorkFiles  # noqa: E402

MICRO_BATCH = 4
COMPARED = ("causal", "permutation", "usefulness", "skip", "jacobian")  # what both ways compute
JACOBIAN_SEQUENCES = 8
LINEAR, JACOBIANS, INTERVENTIONS = "linear fits", "Jacobians", "interventions"
RESULTS = Path(__file__).parent / "results"

type Layer = Callable[[torch.Tensor], torch.Tensor]
type Figures = dict[str, list[float]]


def random_stack(layers: int, width: int, length: int) -> Stack:
    """A Llama with heads of 32 in groups of two; weights such that layers matter."""
    config = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3 // 16 * 16,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "vocab_size": 1024,
    }
    parallel.initialise()
    model = build_model(evaluation_arguments(decoder_settings(config), torch.float32))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
        else:
            parameter.data.fill_(1)
    return Stack(model)


class Plain:
    """The procedure as published, one full pass after the other."""

    def __init__(self, stack: Stack, tokens_NT: torch.Tensor) -> None:
        self.stack = stack
        self.jacobian_tokens_NT = tokens_NT[:JACOBIAN_SEQUENCES]
        self.batches = tokens_NT.split(MICRO_BATCH)
        self.usual: list[Layer] = [self._layer(index) for index in range(stack.num_layers)]

    def _layer(self, index: int) -> Layer:
        return lambda hidden_SBD: self.stack.layer(index, hidden_SBD)

    def passes(self, layers: list[Layer]) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """h_0 to h_L and losses of every micro-batch."""
        for tokens_BT in self.batches:
            hiddens = [self.stack.embed(tokens_BT[:, :-1])]
            for layer in layers:
                hiddens.append(layer(hiddens[-1]))
            yield hiddens, self.stack.losses(hiddens[-1], tokens_BT[:, 1:])

    def loss(self, layers: list[Layer]) -> float:
        losses = [losses_BS.double() for _, losses_BS in self.passes(layers)]
        return torch.cat(losses).mean().item()

    def changed(self, index: int, layer: Layer) -> list[Layer]:
        return [*self.usual[:index], layer, *self.usual[index + 1 :]]

    def score(self) -> Figures:
        layers = range(self.stack.num_layers)
        loss = self.loss(self.usual)
        swaps = []
        for i in layers:
            for j in layers[i + 1 :]:
                order = list(self.usual)
                order[i], order[j] = order[j], order[i]
                swaps.append(abs(self.loss(order) - loss) / loss)
        skips = [self.loss(self.changed(index, lambda hidden_SBD: hidden_SBD)) for index in layers]
        useful = [(self.loss(self.changed(index, self.substitute(index))) - loss) / loss for index in layers]
        figures = {"permutation": swaps, "skip": skips, "usefulness": useful, "causal": self.causal()}
        return figures | {"jacobian": self.jacobians()}

    def causal(self) -> list[float]:
        changes: dict[tuple[int, int], float] = defaultdict(float)
        usual: dict[int, float] = defaultdict(float)
        for (hiddens, _), *skipped in zip(
            self.passes(self.usual),
            *(self.passes(self.changed(s, lambda hidden_SBD: hidden_SBD)) for s in range(self.stack.num_layers)),
            strict=True,
        ):
            for layer in range(self.stack.num_layers):
                added_SBD = hiddens[layer + 1] - hiddens[layer]
                usual[layer] += added_SBD.norm(dim=-1).sum().item()
                for s, (others, _) in enumerate(skipped[:layer]):
                    change_SBD = others[layer + 1] - others[layer] - added_SBD
                    changes[s, layer] += change_SBD.norm(dim=-1).sum().item()
        return [changes[pair] / usual[pair[1]] for pair in sorted(changes)]

    def substitute(self, index: int) -> Layer:
        pairs = [(hiddens[index], hiddens[index + 1]) for hiddens, _ in self.passes(self.usual)]
        x_MD, y_MD = (torch.cat([x.flatten(0, 1) for x in part]).double() for part in zip(*pairs, strict=True))
        ones_M1 = x_MD.new_ones(len(x_MD), 1)
        solution_KD = torch.linalg.lstsq(torch.cat((x_MD, ones_M1), dim=1), y_MD).solution.float()
        return lambda hidden_SBD: hidden_SBD @ solution_KD[:-1] + solution_KD[-1]

    def jacobians(self) -> list[float]:
        """The entries of every layer's matrix, row by row."""
        entries: list[float] = []
        hidden_SBD = self.stack.embed(self.jacobian_tokens_NT[:, :-1])
        for index, layer in enumerate(self.usual):
            rows_DD = rows_by_backward(self.stack, index, hidden_SBD, self.stack.hidden_size)
            entries += rows_DD.flatten().tolist()
            hidden_SBD = layer(hidden_SBD)
        return entries


def by_engine(stack: Stack, tokens_NT: torch.Tensor) -> Figures:
    """The same figures: without the held-out maps, which the plain way does not know."""
    scores = make_scores(COMPARED, stack, Options(jacobian_sequences=JACOBIAN_SEQUENCES))
    plan = make_plan(stack, scores, len(tokens_NT), tokens_NT.shape[1] - 1, None)
    working = engine.Engine(stack, tokens_NT, plan)
    unchanged = working.run_unchanged(scores)
    for score in scores:
        if isinstance(score, usefulness.UsefulnessScore):
            score.held_out.clear()
    groups = by_first(item for score in scores for item in score.interventions())
    with tempfile.TemporaryDirectory() as folder:
        units = working.run_units(groups, WorkFiles(Path(folder), "benchmark"))
    measured = run.means(stack, tokens_NT, unchanged, units)
    for score in scores:
        measured.finished[score.name] = score.result(measured)
    found, layers = measured.finished, range(stack.num_layers)
    pairs = [(i, j) for i in layers for j in layers[i + 1 :]]
    return {
        "permutation": [found["permutation"].matrix[i][j] for i, j in pairs],
        "skip": found["skip"].loss,
        "usefulness": found["usefulness"].scored.relative_loss_increase,
        "causal": [found["causal"].matrix[i][j] for i, j in pairs],
        "jacobian": [entry for layer in found["jacobian"].layers for row in layer.matrix for entry in row],
    }


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds that go into each kind of work, either way; what one kind does within another counts for the latter."""
    seconds: dict[str, float] = defaultdict(float)
    places = [
        ("layers", Stack, "layer"),
        ("output layer and loss", Stack, "losses"),
        (LINEAR, usefulness.LeastSquares, "add"),
        (LINEAR, usefulness.UsefulnessScore, "gather"),
        (LINEAR, Plain, "substitute"),
        (JACOBIANS, JacobianScore, "result"),
        (JACOBIANS, Plain, "jacobians"),
    ]
    within: list[str] = []

    def timed(part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            within.append(part)
            began = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                within.pop()
                if not within:
                    seconds[part] += time.perf_counter() - began

        return call

    with ExitStack() as patches:
        for part, owner, name in places:
            patches.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield seconds


@dataclass(frozen=True)
class Turn:
    """One way's turn: its figures, and seconds, in all and by kind of work."""

    figures: Figures
    seconds: float
    kinds: dict[str, float]

    @classmethod
    def take(cls, call: Callable[[], Figures]) -> Self:
        with timed_parts() as kinds:
            began = time.perf_counter()
            figures = call()
            seconds = time.perf_counter() - began
        return cls(figures, seconds, dict(kinds))

    def parts(self) -> dict[str, float]:
        """Seconds by part of the suite."""
        parts = {part: self.kinds[part] for part in (LINEAR, JACOBIANS)}
        return {"whole": self.seconds, INTERVENTIONS: self.seconds - sum(parts.values()), **parts}


def largest_difference(found: Figures, expected: Figures) -> float:
    """Of all figures, relative to the largest of their kind."""
    return max(
        max(abs(a - b) for a, b in zip(found[kind], values, strict=True)) / max(map(abs, values))
        for kind, values in expected.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stack = random_stack(arguments.layers, arguments.width, arguments.length)
    tokens_NT = torch.randint(1024, (arguments.sequences, arguments.length + 1))
    plain, ours = [], []
    for _ in range(arguments.rounds):
        plain.append(Turn.take(lambda: Plain(stack, tokens_NT).score()))
        ours.append(Turn.take(lambda: by_engine(stack, tokens_NT)))
    result = compare(plain, ours)
    if arguments.save:
        settings = {name: getattr(arguments, name) for name in ("layers", "width", "sequences", "length", "threads")}
        settings |= {"micro_batch": MICRO_BATCH, "jacobian_sequences": JACOBIAN_SEQUENCES}
        path = RESULTS / f"scoring_{arguments.width}.json"
        path.write_text(json.dumps({"benchmark": "scoring", **settings, **machine("cpu"), **result}, indent=2) + "\n")
        print(f"wrote {path}")


def compare(plain: Sequence[Turn], ours: Sequence[Turn]) -> dict[str, Any]:
    """Print, and return, what the turns of both ways say."""
    parts: dict[str, Any] = {}
    for part in plain[0].parts():
        seconds = {"plain": [turn.parts()[part] for turn in plain], "engine": [turn.parts()[part] for turn in ours]}
        ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
        whole = {"plain": plain, "engine": ours}
        shares = {
            way: statistics.median(taken) / statistics.median(turn.seconds for turn in whole[way])
            for way, taken in seconds.items()
        }
        parts[part] = {"seconds": seconds, "shares": shares, "ratios": ratios, "ratio": statistics.median(ratios)}
        print(
            f"{part:14} plain {statistics.median(seconds['plain']):8.2f} s ({shares['plain']:4.0%}), "
            f"engine {statistics.median(seconds['engine']):8.2f} s ({shares['engine']:4.0%}): "
            f"{statistics.median(ratios):.2f} times as fast (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
        )
    difference = largest_difference(ours[-1].figures, plain[-1].figures)
    print(f"largest relative difference of a figure: {difference:.1e}")
    shares = {kind: seconds / ours[-1].seconds for kind, seconds in ours[-1].kinds.items()}
    shares["the rest"] = 1 - sum(shares.values())
    print("where the engine's time goes: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    return {"parts": parts, "largest_relative_difference": difference, "shares": shares}


if __name__ == "__main__":
    main()
