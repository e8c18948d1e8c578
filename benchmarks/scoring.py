"""The scoring engine against the published procedure, done plainly, on the same model with the same results.

Plainly: every intervention is a full forward pass in micro-batches of 4 sequences; each layer's linear substitute has
a pass of its own that collects what goes in and comes out, and one `lstsq` in float64. Both ways run the same Megatron
layers. They take turns, and the ratio is taken within a round, so that a noisy machine harms both alike.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from sparsecod_mcore import platform

platform.prepare()  # before anything imports Megatron

import torch  # noqa: E402

from benchmarks.measure import machine  # noqa: E402
from sparsecod_mcore.exchange import llama  # noqa: E402
from sparsecod_mcore.model.build import build_model, evaluation_arguments  # noqa: E402
from sparsecod_mcore.scoring import engine, parallel, run, usefulness  # noqa: E402
from sparsecod_mcore.scoring.interventions import by_first  # noqa: E402
from sparsecod_mcore.scoring.plan import make_plan  # noqa: E402
from sparsecod_mcore.scoring.registry import make_scores  # noqa: E402
from sparsecod_mcore.scoring.score import Options  # noqa: E402
from sparsecod_mcore.scoring.stack import Stack  # noqa: E402
from sparsecod_mcore.scoring.work_file import WorkFiles  # noqa: E402

MICRO_BATCH = 4
COMPARED = ("causal", "permutation", "usefulness", "skip")  # what both ways compute
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
    model = build_model(evaluation_arguments(llama.settings(config), torch.float32))
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
        return {"permutation": swaps, "skip": skips, "usefulness": useful, "causal": self.causal()}

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


def by_engine(stack: Stack, tokens_NT: torch.Tensor) -> Figures:
    """The same figures; of usefulness also the fits that are held out."""
    scores = make_scores(COMPARED, stack, Options())
    plan = make_plan(stack, scores, len(tokens_NT), tokens_NT.shape[1] - 1, None)
    working = engine.Engine(stack, tokens_NT, plan)
    unchanged = working.run_unchanged(scores)
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
    }


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Seconds that the engine spends in each kind of work."""
    seconds: dict[str, float] = defaultdict(float)
    places = {
        "layers": (Stack, "layer"),
        "output layer and loss": (Stack, "losses"),
        "least squares": (usefulness.LeastSquares, "add"),
        "solving them": (usefulness.UsefulnessScore, "gather"),
    }
    originals = {part: getattr(owner, name) for part, (owner, name) in places.items()}

    def timed(part: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                seconds[part] += time.perf_counter() - began

        return call

    for part, (owner, name) in places.items():
        setattr(owner, name, timed(part, originals[part]))
    try:
        yield seconds
    finally:
        for part, (owner, name) in places.items():
            setattr(owner, name, originals[part])


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
    ways: dict[str, Callable[[], Figures]] = {
        "plain": lambda: Plain(stack, tokens_NT).score(),
        "engine": lambda: by_engine(stack, tokens_NT),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    figures: dict[str, Figures] = {}
    parts: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for way, call in ways.items():
            with timed_parts() as inside:
                began = time.perf_counter()
                figures[way] = call()
                seconds[way].append(time.perf_counter() - began)
            if way == "engine":
                parts = dict(inside)
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["engine"], strict=True)]
    difference = largest_difference(figures["engine"], figures["plain"])
    shares = {part: value / seconds["engine"][-1] for part, value in parts.items()}
    shares["the rest"] = 1 - sum(shares.values())
    for way, values in seconds.items():
        print(f"{way:8} {statistics.median(values):8.2f} s")
    print(
        f"the engine is {statistics.median(ratios):.2f} times as fast (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
    )
    print(f"largest relative difference of a figure: {difference:.1e}")
    print("where the engine's time goes: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    if arguments.save:
        settings = {name: getattr(arguments, name) for name in ("layers", "width", "sequences", "length", "threads")}
        result = {"benchmark": "scoring", **settings, "micro_batch": MICRO_BATCH, **machine("cpu")}
        result |= {"seconds": seconds, "ratios": ratios, "ratio": statistics.median(ratios)}
        result |= {"largest_relative_difference": difference, "shares": shares}
        path = RESULTS / f"scoring_{arguments.width}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
