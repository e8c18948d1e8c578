"""What the paper (arXiv 2603.15389) reports, for runs to be laid beside: tables 1 to 5 and figure 1.

A run has a counterpart where its shape, recipe and training tokens are those of a published one.
"""

import math
from dataclasses import dataclass
from typing import Any

from sparsecod_mcore.report.gather import Run

_TOKENS_TOLERANCE = 0.05  # relative: runs end at a whole step
_BASELINE = {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16}
_DENSE_400M = {"num_layers": 16, "hidden_size": 1536, "ffn_hidden_size": 3072, "num_attention_heads": 12}
_MOE_400M = {
    "num_layers": 16, "hidden_size": 768, "num_attention_heads": 12, "num_experts": 32, "moe_router_topk": 4,
    "moe_shared_expert_intermediate_size": 1536,
}  # fmt: skip
_MOE_1B = {
    "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_experts": 64, "moe_router_topk": 8,
}  # fmt: skip
_NAMES = ("perplexity", "causal", "permutation", "usefulness")


@dataclass(frozen=True)
class Published:
    """One model of the paper: where it stands, what makes a run its counterpart, and its figures."""

    place: str
    settings: dict[str, Any]
    tokens: float
    figures: dict[str, float]


def _depth(layers: int, effective: int, wasted: int, perplexity: float, *tasks: float) -> Published:
    names = ("mmlu", "arc_challenge", "arc_easy", "hellaswag")
    figures = {"perplexity": perplexity, "effective": effective, "wasted": wasted}
    figures |= {name: value / 100 for name, value in zip(names, tasks, strict=True)}
    return Published(
        f"table 1, {layers} layers",
        _BASELINE | {"num_layers": layers, "seq_length": 1024, "weight_decay": 0.1, "global_batch_size": 256},
        10e9,
        figures,
    )


def _other(place: str, tokens: float, figures: tuple[float, ...], **settings: Any) -> Published:
    return Published(place, settings, tokens, dict(zip(_NAMES, figures, strict=True)))


PUBLISHED = (
    _depth(12, 12, 0, 13.72, 24.20, 30.89, 58.96, 47.24),
    _depth(16, 13, 3, 13.65, 25.20, 31.72, 60.45, 47.24),
    _depth(24, 15, 9, 13.53, 26.39, 32.59, 61.24, 47.50),
    _depth(32, 18, 14, 13.47, 27.52, 34.22, 61.74, 48.63),
    *(
        _other(f"table 2, weight decay {decay:g}", 5e9, figures, weight_decay=decay, global_batch_size=128, **_BASELINE)
        for decay, figures in {
            0.0: (15.63, 0.25, 0.41, 0.75),
            0.01: (15.20, 0.26, 0.42, 0.75),
            0.1: (14.83, 0.31, 0.52, 0.81),
            1.0: (15.55, 0.20, 0.50, 0.69),
            3.0: (773.42, 0.03, 0.07, 0.63),
        }.items()
    ),
    *(
        _other(
            f"table 3, length {length}", 5e9, figures, seq_length=length, weight_decay=0.1, global_batch_size=256,
            **_BASELINE,
        )
        for length, figures in {
            256: (18.51, 0.24, 0.41, 0.69),
            512: (15.71, 0.25, 0.45, 0.75),
            1024: (14.77, 0.28, 0.46, 0.75),
            2048: (14.51, 0.30, 0.50, 0.81),
            4096: (14.52, 0.31, 0.51, 0.81),  # permutation as in table 4, of the same model
            8192: (16.30, 0.29, 0.49, 0.75),
        }.items()
    ),
    _other("table 4, G = 4", 5.35e9, (14.50, 0.31, 0.57, 0.87), num_query_groups=4, seq_length=4096, **_BASELINE),
    _other("table 4, G = 16", 5.6e9, (14.47, 0.34, 0.63, 0.87), num_query_groups=1, seq_length=4096, **_BASELINE),
    _other("table 5, Dense-400M", 5e9, (17.56, 0.30, 0.54, 0.87), seq_length=4096, **_DENSE_400M),
    _other("table 5, MoE-2BA400M", 5e9, (15.89, 0.36, 0.59, 0.94), seq_length=4096, **_MOE_400M),
    _other("table 5, MoE-7BA1B", 5e9, (13.82, 0.34, 0.61, 0.94), seq_length=4096, **_MOE_1B),
)  # fmt: skip


def counterpart(run: Run) -> Published | None:
    """The published model that the run repeats, or None."""
    if run.tokens is None or not run.config:
        return None
    heads = run.config.get("num_attention_heads")
    # What is not set means: every head its own key and value, no experts.
    settings = {"num_query_groups": heads, "num_experts": None} | run.config
    for published in PUBLISHED:
        wanted = {"num_query_groups": published.settings.get("num_attention_heads"), "num_experts": None}
        if all(settings.get(name) == value for name, value in (wanted | published.settings).items()) and math.isclose(
            run.tokens, published.tokens, rel_tol=_TOKENS_TOLERANCE
        ):
            return published
    return None
