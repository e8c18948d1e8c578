"""What can be read off a model as it is: sparsity of weights and of attention, its entropy, moments of every stream."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecod_mcore.data.atomic import make_folder
from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.progress import ProgressLine
from sparsecod_mcore.report.score_figures import save_score_figures
from sparsecod_mcore.report.tables import sparsity_table
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.attention import AttentionMeter
from sparsecod_mcore.scoring.moments import MomentsMeter
from sparsecod_mcore.scoring.provenance import provenance_of
from sparsecod_mcore.scoring.results import Attention, Moments, Provenance, Scores, write_scores
from sparsecod_mcore.scoring.run import DTYPES
from sparsecod_mcore.scoring.sequences import check_sequences, load_sequences
from sparsecod_mcore.scoring.stack import Stack, load_stack, model_files
from sparsecod_mcore.scoring.weights import weight_sparsity

WHAT = ("weights", "attention", "entropy", "moments")
FILE = "sparsity"  # beside the scores.json that interventions leave
TOKENS_AT_A_TIME = 8192  # that go through a layer together


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure of which model, on what."""

    model: str
    what: Sequence[str] = WHAT  # attention and entropy come from one pass, and give one section of the results
    data: str | None = None
    sequences: int | None = None
    lengths: Sequence[int] = ()  # of sequences; none for the data's own
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor: int = 1  # parallel size
    expert: int = 1  # parallel size

    def __post_init__(self) -> None:
        """Raises `UserError` for what cannot be."""
        for name in self.what:
            if name not in WHAT:
                raise UserError(f"{name!r} cannot be measured{nearest(name, WHAT)}; {', '.join(WHAT)} can")
        if self.data is None and set(self.what) != {"weights"}:
            raise UserError(f"--data is needed to measure {', '.join(self.what)}")


class _TokensProgress(ProgressLine):
    def __init__(self) -> None:
        super().__init__("measuring")
        self._tokens = 0

    def advance(self, tokens: int, of: int) -> None:
        self._tokens += tokens
        self.show(self._tokens / of)

    def amounts(self, seconds: float) -> str:
        return f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"


def measure(request: Request) -> Scores:
    """Measure it all. Collective under torchrun, with the same result on every rank.

    Raises `UserError` if the model or the data cannot be used, or do not go together.
    """
    tokens_by_length = _load(request)
    stack = load_stack(Path(request.model), DTYPES[request.dtype], tensor=request.tensor, expert=request.expert)
    checked = {length: check_sequences(tokens, stack, str(request.data)) for length, tokens in tokens_by_length.items()}
    attention, moments = _pass_sequences(stack, request.what, checked)
    weights = weight_sparsity(stack) if "weights" in request.what else None
    longest = tokens_by_length[max(tokens_by_length)] if tokens_by_length else None
    options = {"what": ",".join(name for name in WHAT if name in request.what)}
    if len(tokens_by_length) > 1:
        options["lengths"] = ",".join(map(str, tokens_by_length))

    def provenance() -> Provenance:
        files = model_files(Path(request.model))
        return provenance_of(
            request.model, files, request.data, longest, dtype=request.dtype, device=stack.device, options=options
        )

    return Scores(
        provenance=parallel.from_first(provenance),
        layers=stack.num_layers,
        sequences=None if longest is None else len(longest),
        length=None if longest is None else max(tokens_by_length),
        weight_sparsity=weights,
        attention=attention,
        moments=moments,
    )


def _load(request: Request) -> dict[int, NDArray[np.int64]]:
    """Tokens [N, T + 1] by T, the shortest first."""
    if request.data is None or set(request.what) == {"weights"}:
        return {}
    loaded = [load_sequences(request.data, request.sequences, length) for length in request.lengths or (None,)]
    return dict(sorted((tokens_NT.shape[1] - 1, tokens_NT) for tokens_NT in loaded))


def _pass_sequences(
    stack: Stack, what: Sequence[str], tokens_by_length: dict[int, torch.Tensor]
) -> tuple[Attention | None, Moments | None]:
    """Attention at every length, moments at the longest. Sequences are dealt to workers, and go in batches."""
    measures_attention = not {"attention", "entropy"}.isdisjoint(what)
    lengths, moments = {}, None
    work = sum(tokens_NT[:, 1:].numel() for tokens_NT in tokens_by_length.values())
    with ExitStack() as shown:
        progress = shown.enter_context(_TokensProgress()) if work and parallel.is_first() else None
        for length, tokens_NT in tokens_by_length.items():
            measures_moments = "moments" in what and length == max(tokens_by_length)
            attention_meter = AttentionMeter(stack) if measures_attention else None
            moments_meter = MomentsMeter(stack) if measures_moments else None
            meters = [meter for meter in (attention_meter, moments_meter) if meter is not None]
            with ExitStack() as measuring:
                for meter in meters:
                    measuring.enter_context(meter.measuring())
                for batch_BS in _batches(tokens_NT[:, :-1]) if meters else ():
                    hidden_SBD = stack.embed(batch_BS.to(stack.device))
                    for layer in range(stack.num_layers):
                        hidden_SBD = stack.layer(layer, hidden_SBD)
                    if progress is not None:
                        progress.advance(batch_BS.numel() * parallel.workers(), work)
            if attention_meter is not None:
                lengths[str(length)] = attention_meter.result()
            if moments_meter is not None:
                moments = moments_meter.result(len(tokens_NT), length)
    return Attention(lengths=lengths) if measures_attention else None, moments


def _batches(tokens_NS: torch.Tensor) -> Iterable[torch.Tensor]:
    """This worker's share."""
    mine_NS = tokens_NS[parallel.worker() :: parallel.workers()]
    return mine_NS.split(max(1, TOKENS_AT_A_TIME // tokens_NS.shape[1])) if len(mine_NS) else ()


def measure_into(folder: Path, request: Request) -> None:
    """Measure, write sparsity.json, sparsity.csv and figures, and print a table. Collective under torchrun."""
    make_folder(folder)
    scores = measure(request)

    def write() -> None:
        write_scores(folder, scores, FILE)
        figures = save_score_figures(folder / f"{FILE}.json", folder / "figures")
        print(f"{sparsity_table(scores)}\n\n{folder}: {FILE}.json, {FILE}.csv and {len(figures)} figures")

    parallel.from_first(write)
