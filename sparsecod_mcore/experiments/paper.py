"""The runs of "When Does Sparsity Mitigate the Curse of Depth in LLMs" (arXiv 2603.15389), one table.

Numbers that the source leaves illegible are this project's choice and named so: learning rates, the values of the
ablation's steps, and the sequence length of the weight-decay runs.
"""

from dataclasses import replace
from typing import Any

from sparsecod_mcore.experiments.runs import Published, Recipe, Run, Shape

VOCABULARY = 50277  # of the GPT-NeoX-20B tokenizer; padded to 50304
LEARNING_RATES = (2e-4, 4e-4, 6e-4, 1e-3)  # to be swept per depth and per step of the ablation
_LR = 4e-4
_LONGEST = 8192  # every model can be evaluated at this length (A.6, A.7)
_TOKENS_AT_ONCE = 16384  # of a micro-batch
_GPUS = 8  # that a step can be spread over without accumulation

# C.6: values of figure 1 that are not legible in the source.
ABLATION_SEQ_LENGTH = 4096  # the longest before table 3 turns
ABLATION_WEIGHT_DECAY = 0.2  # above the 0.1 of the steps before, and below the 1.0 that harms in table 2
ABLATION_KV_HEADS = 4  # G = 4 of table 4

_REST: dict[str, Any] = {
    "init_method_std": 0.02,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 128,
    "bf16": True,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "dist_ckpt_optim_fully_reshardable": True,
    "log_interval": 10,
    "eval_interval": 500,
    "save_interval": 500,
    "num_workers": 4,
    "seed": 1234,
    "cod.stats_interval": 1,
}


def _recipe(tokens: float, seq_length: int, global_batch: int = 256, weight_decay: float = 0.1) -> Recipe:
    return Recipe(
        seq_length=seq_length,
        max_positions=_LONGEST,
        tokens=tokens,
        global_batch=global_batch,
        micro_batch=min(_TOKENS_AT_ONCE // seq_length, global_batch // _GPUS),
        weight_decay=weight_decay,
        lr=_LR,
        warmup_steps=1000,
        eval_tokens=20 * 256 * 4096,
    )


def _run(name: str, group: str, says: str, shape: Shape, recipe: Recipe, **published: str) -> Run:
    fused = shape.hidden // shape.heads % 8 == 0
    return Run(
        name=name,
        group=group,
        says=says,
        shape=shape,
        recipe=recipe,
        rest=_REST,
        published=Published(**published),
        overrides=None if fused else {"attention_backend": "unfused"},
    )


def _dense(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int | None = None) -> Shape:
    return Shape(layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads or heads)


_BASELINE = _dense(16, 2048, 8192, 16)

_DEPTH = [
    _run(
        f"depth_{layers}", "depth_control", f"Depth {layers} at equal width (table 6).",
        replace(_BASELINE, layers=layers), _recipe(10e9, 1024), total=size,
    )
    for layers, size in ((12, "0.9B"), (16, "1.2B"), (24, "1.7B"), (32, "2.3B"))
]  # fmt: skip

_WEIGHT_DECAY = [
    _run(
        f"weight_decay_{decay:g}", "weight_decay",
        f"Weight decay {decay:g} (table 2). Its sequence length is not stated: 1024, whose perplexity in table 3 fits.",
        _BASELINE, _recipe(5e9, 1024, 128, decay), total="1.2B",
    )
    for decay in (0.0, 0.01, 0.1, 1.0, 3.0)
]  # fmt: skip

_SEQUENCE_LENGTH = [
    _run(
        f"sequence_length_{length}", "sequence_length",
        f"Sequence length {length} at equal tokens (table 3).", _BASELINE, _recipe(5e9, length), total="1.2B",
    )
    for length in (256, 512, 1024, 2048, 4096, 8192)
]  # fmt: skip

_GQA = [
    _run(
        f"gqa_g{16 // kv_heads}", "grouped_query_attention",
        f"{16 // kv_heads} query heads to a key-value head, at about equal training FLOPs (table 4).",
        _dense(16, 2048, 8192, 16, kv_heads), _recipe(tokens, 4096), total=size,
    )
    for kv_heads, tokens, size in ((16, 5.0e9, "1.176B"), (4, 5.35e9, "1.076B"), (1, 5.6e9, "1.051B"))
]  # fmt: skip

_OLMOE = Shape(layers=16, hidden=2048, ffn=1024, heads=16, kv_heads=16, experts=64, top_k=8)
_MOE_RECIPE = _recipe(5e9, 4096)
_MOE = [
    _run("dense_400m", "mixture_of_experts", "Dense-400M (table 7).", _dense(16, 1536, 3072, 12), _MOE_RECIPE,
         active="400M"),
    _run("moe_2b_a400m", "mixture_of_experts", "MoE-2BA400M (table 7): 4 of 32 experts, and a shared one.",
         Shape(layers=16, hidden=768, ffn=1536, heads=12, kv_heads=12, experts=32, top_k=4, shared_experts=1),
         _MOE_RECIPE, total="2B", active="400M"),
    _run("dense_1b", "mixture_of_experts", "Dense-1B (table 7).", _BASELINE, _MOE_RECIPE, active="1B"),
    _run("moe_7b_a1b", "mixture_of_experts",
         "MoE-7BA1B: 8 of 64 experts, of the width (OLMoE's) that gives 7B and 1B; table 7 has twice that.",
         _OLMOE, _MOE_RECIPE, total="7B", active="1B"),
    _run("moe_7b_a1b_table7", "mixture_of_experts", "MoE-7BA1B with the expert width of table 7: 13B, 2B active.",
         replace(_OLMOE, ffn=2048), _MOE_RECIPE, total="7B", active="1B"),
]  # fmt: skip

_DEEP = _dense(32, 1536, 6144, 16)
_DEEP_MOE = Shape(
    layers=32, hidden=1120, ffn=1120, heads=16, kv_heads=ABLATION_KV_HEADS, experts=64, top_k=8
)  # fmt: skip
_LONG = _recipe(10e9, ABLATION_SEQ_LENGTH)
_DECAYED = _recipe(10e9, ABLATION_SEQ_LENGTH, weight_decay=ABLATION_WEIGHT_DECAY)
_ABLATION = [
    _run("ablation_1_l16", "ablation", "Figure 1: the baseline of 16 layers.", _BASELINE, _recipe(10e9, 1024),
         active="1.2B"),
    _run("ablation_2_l32", "ablation", "Figure 1: 32 layers, naively.", _DEEP, _recipe(10e9, 1024), active="1.2B"),
    _run("ablation_3_long_context", "ablation", "Figure 1: 32 layers + long context.", _DEEP, _LONG, active="1.2B"),
    _run("ablation_4_weight_decay", "ablation", "Figure 1: 32 layers + long context + weight decay.", _DEEP, _DECAYED,
         active="1.2B"),
    _run("ablation_5_gqa_moe", "ablation",
         "Figure 1: 32 layers + long context + weight decay + GQA + MoE. Head dimension 70: no fused attention.",
         _DEEP_MOE, _DECAYED, active="1.2B"),
    _run("ablation_5_gqa_moe_1152", "ablation",
         "The last step of figure 1 at width 1152: head dimension 72, which fused attention takes.",
         replace(_DEEP_MOE, hidden=1152, ffn=1152), _DECAYED, active="1.2B"),
]  # fmt: skip

_BLOCK_VARIANCE = [
    _run(f"block_variance_{layers}", "block_variance", f"Variance of single blocks at depth {layers} (A.2, A.4).",
         _dense(layers, 1536, 4608, 12), _recipe(1500 * 256 * 4096, 4096))
    for layers in (16, 32)
]  # fmt: skip

PAPER_RUNS: tuple[Run, ...] = (
    *_DEPTH, *_WEIGHT_DECAY, *_SEQUENCE_LENGTH, *_GQA, *_MOE, *_ABLATION, *_BLOCK_VARIANCE,
)  # fmt: skip
