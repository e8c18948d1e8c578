"""What does not add up in a configuration, or in what the paper publishes of it."""

from argparse import Namespace
from pathlib import Path

from sparsecod_mcore.config import read_config
from sparsecod_mcore.experiments.amounts import agrees, in_words
from sparsecod_mcore.experiments.paper import PAPER_RUNS
from sparsecod_mcore.experiments.parameters import count_parameters
from sparsecod_mcore.experiments.runs import Run, settings_of

_RUNS = {run.name: run for run in PAPER_RUNS}
_LONGEST_WARMUP = 0.4  # of training


def remarks_on(path: Path, args: Namespace) -> tuple[str, ...]:
    """A sentence for each thing that does not add up in the configuration at `path`, whose validated form is `args`."""
    remarks = []
    if args.kv_channels % 8:
        remarks.append(
            f"head dimension {args.kv_channels} is no multiple of 8: no fused attention kernel takes it, and the "
            "scores of T x T are kept"
        )
    if args.num_experts and not args.moe_grouped_gemm:
        remarks.append("experts run one after another; on GPUs with Transformer Engine add --moe-grouped-gemm")
    warmup = args.lr_warmup_iters / args.train_iters
    if warmup > _LONGEST_WARMUP:
        remarks.append(f"warm-up is {warmup:.0%} of training")
    run = _RUNS.get(path.stem)
    if run is not None and read_config(path) == settings_of(run):
        remarks += _against_published(run, args)
    return tuple(remarks)


def _against_published(run: Run, args: Namespace) -> list[str]:
    count = count_parameters(args)
    figures = (
        ("parameters", run.published.total, count.published_total, count.total),
        ("active parameters", run.published.active, count.published_active, count.active),
    )
    return [
        f"{what}: published {published}, counted {in_words(one)} with one embedding, {in_words(both)} with both"
        for what, published, one, both in figures
        if published is not None and not agrees(published, one)
    ]
