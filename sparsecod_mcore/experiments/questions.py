"""The paper's six questions at any size, and the trends to look for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.experiments.runs import Recipe, Run, Shape
from sparsecod_mcore.experiments.sizes import Size

type Direction = Literal["rises", "falls", "highest", "lowest"]


@dataclass(frozen=True)
class Trend:
    """What the paper finds of one measure (a key of `measures.MEASURES`) over a question's values, in order.

    `rises` and `falls` compare all of `over` (labels of values; None for all), in their order; `highest` and `lowest`
    compare the value `at` with the first and the last of them.
    """

    measure: str
    direction: Direction
    published: str
    over: tuple[str, ...] | None = None
    at: str | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question: runs that differ in one thing, by its value's label, and what the paper found."""

    name: str
    asks: str
    runs: dict[str, Run]
    trends: tuple[Trend, ...]
    score_length: int


_LONGER = 4  # times, in the ladder
_STRONGER_DECAY = 0.3


class _Builder:
    """Makes the runs of one size."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.shape = Shape(
            layers=size.layers, hidden=size.hidden, ffn=size.ffn, heads=size.heads, kv_heads=size.heads
        )  # fmt: skip
        longest = max(*size.lengths, _LONGER * size.seq_length)
        self.recipe = Recipe(
            seq_length=size.seq_length, max_positions=longest, tokens=size.tokens, global_batch=size.global_batch,
            micro_batch=size.micro_batch, weight_decay=0.1, lr=size.lr, warmup_steps=size.warmup_steps,
            eval_tokens=size.eval_tokens,
        )  # fmt: skip

    def run(self, group: str, label: str, says: str, shape: Shape, recipe: Recipe) -> Run:
        fewer_steps = replace(recipe, warmup_steps=min(recipe.warmup_steps, recipe.steps // 10))
        return Run(
            name=f"{group}_{label}", group=group, says=says, shape=shape, recipe=fewer_steps, rest=self.size.rest
        )

    def at_length(self, length: int, **changes: Any) -> Recipe:
        """The same number of sequences to a step, as in the paper, so with fewer steps for equal tokens."""
        at_once = max(1, self.size.micro_batch * self.size.seq_length // length)
        return replace(
            self.recipe, seq_length=length, micro_batch=min(at_once, self.size.global_batch), **changes
        )  # fmt: skip


def _depth(build: _Builder) -> Question:
    size = build.size
    return Question(
        name="depth_control",
        asks="What does depth do, at equal width?",
        runs={
            str(depth): build.run(
                "depth", str(depth), f"Depth {depth}.", replace(build.shape, layers=depth), build.recipe
            )
            for depth in size.depths
        },
        trends=(
            Trend("last_layer_variance", "rises", "grows substantially with depth (figure 2a)"),
            Trend("perplexity", "falls", "13.72 → 13.47"),
            Trend("usefulness", "falls", "0.75 → 0.53"),
            Trend("causal", "falls", "declines (figure 2c)"),
            Trend("permutation", "falls", "declines (figure 2c)"),
            Trend("wasted", "rises", "0 → 14 layers"),
        ),
        score_length=size.seq_length,
    )


def _weight_decay(build: _Builder) -> Question:
    decays = (0.0, 0.01, 0.1, 1.0, 3.0)
    return Question(
        name="weight_decay",
        asks="What does weight decay do?",
        runs={
            f"{decay:g}": build.run(
                "weight_decay", f"{decay:g}", f"Weight decay {decay:g}.", build.shape,
                replace(build.recipe, weight_decay=decay),
            )
            for decay in decays
        },
        trends=(
            Trend("last_layer_variance", "falls", "falls; below 25 at the largest values"),
            Trend("weight_sparsity", "rises", "rises at every threshold"),
            Trend("perplexity", "lowest", "15.63, 14.83 at 0.1, 773.42", at="0.1"),
            Trend("causal", "highest", "0.25, 0.31 at 0.1, 0.03", at="0.1"),
            Trend("permutation", "highest", "0.41, 0.52 at 0.1, 0.07", at="0.1"),
            Trend("usefulness", "highest", "0.75, 0.81 at 0.1, 0.63", at="0.1"),
        ),
        score_length=build.size.seq_length,
    )  # fmt: skip


def _sequence_length(build: _Builder) -> Question:
    lengths = build.size.lengths
    return Question(
        name="sequence_length",
        asks="What does the training length do, at equal tokens?",
        runs={
            str(length): build.run(
                "sequence_length", str(length), f"Sequence length {length}.", build.shape, build.at_length(length)
            )
            for length in lengths
        },
        trends=(
            Trend("last_layer_variance", "falls", "falls"),
            Trend("attention_sparsity", "rises", "rises at every threshold"),
            Trend("attention_entropy", "falls", "falls"),
            Trend("perplexity", "falls", "18.51 → 14.51 at 2048, then 16.30 at 8192"),
            Trend("causal", "rises", "0.24 → 0.31 at 4096, then 0.29"),
            Trend("usefulness", "rises", "0.69 → 0.81 at 4096, then 0.75"),
        ),
        score_length=lengths[len(lengths) // 2],
    )


def _grouped_query_attention(build: _Builder) -> Question:
    size = build.size
    runs = {}
    for kv_heads, tokens in zip(size.kv_heads, size.kv_tokens, strict=True):
        group = size.heads // kv_heads
        says = f"{group} query heads to a key-value head, at equal FLOPs."
        shape, recipe = replace(build.shape, kv_heads=kv_heads), replace(build.recipe, tokens=size.tokens * tokens)
        runs[f"G={group}"] = build.run("gqa", f"g{group}", says, shape, recipe)
    return Question(
        name="grouped_query_attention",
        asks="What does sharing keys and values do, at equal FLOPs?",
        runs=runs,
        trends=(
            Trend("last_layer_variance", "falls", "falls, by half from G = 1 to 16"),
            Trend("perplexity", "falls", "14.52 → 14.47"),
            Trend("causal", "rises", "0.31 → 0.34"),
            Trend("permutation", "rises", "0.51 → 0.63"),
            Trend("usefulness", "rises", "0.81 → 0.87"),
        ),
        score_length=size.seq_length,
    )


def _mixture_of_experts(build: _Builder) -> Question:
    size = build.size
    experts = replace(build.shape, ffn=size.expert_ffn, experts=size.experts, top_k=size.top_k)
    says = f"{size.top_k} of {size.experts} experts, together as wide as the dense MLP."
    return Question(
        name="mixture_of_experts",
        asks="What do experts do, at equal active parameters?",
        runs={
            "dense": build.run("moe", "dense", "The dense model beside the mixture.", build.shape, build.recipe),
            "MoE": build.run("moe", "experts", says, experts, build.recipe),
        },
        trends=(
            Trend("last_layer_variance", "falls", "to a third (1B active), to a sixth (400M active)"),
            Trend("perplexity", "falls", "14.52 → 13.82"),
            Trend("causal", "rises", "0.31 → 0.34"),
            Trend("permutation", "rises", "0.51 → 0.61"),
            Trend("usefulness", "rises", "0.81 → 0.94"),
        ),
        score_length=size.seq_length,
    )


def _ablation(build: _Builder) -> Question:
    size = build.size
    long = build.at_length(_LONGER * size.seq_length)
    decayed = replace(long, weight_decay=_STRONGER_DECAY)
    steps = (
        ("baseline", f"{size.layers} layers.", build.shape, build.recipe),
        ("deep", f"{size.deep.layers} layers of equal parameters, naively.", size.deep, build.recipe),
        ("long context", "The same at a longer context.", size.deep, long),
        ("weight decay", "The same with more weight decay.", size.deep, decayed),
        ("GQA + MoE", "The same with grouped queries and experts.", size.deep_moe, decayed),
    )
    ladder = ("deep", "long context", "weight decay", "GQA + MoE")
    return Question(
        name="ablation",
        asks="Does sparsity make depth useful?",
        runs={
            label: build.run(
                "ablation", f"{number}_{label.replace(' + ', '_').replace(' ', '_').lower()}", about, shape, recipe
            )
            for number, (label, about, shape, recipe) in enumerate(steps, 1)
        },
        trends=(
            Trend("usefulness", "falls", "0.75 → 0.53", over=("baseline", "deep")),
            Trend("usefulness", "rises", "0.53, 0.59, 0.63, 0.75", over=ladder),
            Trend("last_layer_variance", "falls", "what the steps are for", over=ladder),
        ),
        score_length=size.seq_length,
    )


_QUESTIONS = {
    "depth_control": _depth,
    "weight_decay": _weight_decay,
    "sequence_length": _sequence_length,
    "grouped_query_attention": _grouped_query_attention,
    "mixture_of_experts": _mixture_of_experts,
    "ablation": _ablation,
}
QUESTIONS = tuple(_QUESTIONS)


def question_of(name: str, size: Size) -> Question:
    """The question called `name` at a size. Raises `UserError` for another."""
    if name not in _QUESTIONS:
        raise UserError(f"question {name} is given, {', '.join(QUESTIONS)} are accepted{nearest(name, QUESTIONS)}")
    return _QUESTIONS[name](_Builder(size))


def runs_of(size: Size) -> Iterable[Run]:
    """The runs of all questions."""
    return (run for name in QUESTIONS for run in question_of(name, size).runs.values())
