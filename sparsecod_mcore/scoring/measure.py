"""What can be read off a model as it is: sparsity of weights and of attention, its entropy, moments of every stream."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.progress import ProgressLine
from sparsecod_mcore.report.score_figures import save_score_figures
from sparsecod_mcore.report.tables import sparsity_table
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.attention import AttentionMeter
from sparsecod_mcore.scoring.moments import MomentsMeter
from sparsecod_mcore.scoring.provenance import provenance_of
from sparsecod_mcore.scoring.results import Attention, Scores, read_scores, write_scores
from sparsecod_mcore.scoring.run import DTYPES
from sparsecod_mcore.scoring.schema import encode
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

    @property
    def measures_attention(self) -> bool:
        return not {"attention", "entropy"}.isdisjoint(self.what)


class _TokensProgress(ProgressLine):
    """Tells tokens/s, of all lengths together."""

    def __init__(self, total: int) -> None:
        super().__init__("measuring")
        self._total = total
        self._tokens = self._skipped = 0

    def advance(self, tokens: int) -> None:
        self._tokens = min(self._tokens + tokens, self._total)  # the last batch may be smaller on other workers
        self.show(self._tokens / self._total)

    def skip_tokens(self, tokens: int) -> None:
        self._tokens += tokens
        self._skipped += tokens
        self.skip(self._tokens / self._total)

    def amounts(self, seconds: float) -> str:
        return f"{self._tokens:,} tokens, {(self._tokens - self._skipped) / seconds:,.0f} tokens/s"


def measure(request: Request, unfinished: Path | None = None) -> Scores:
    """Measure it all. Collective under torchrun, with the same result on every rank.

    After each length what there is is kept in the file `unfinished`, from which the same request goes on.
    Raises `UserError` if the model or the data cannot be used, or do not go together.
    """
    tokens_by_length = _load(request)
    stack = load_stack(Path(request.model), DTYPES[request.dtype], tensor=request.tensor, expert=request.expert)
    checked = {length: check_sequences(tokens, stack, str(request.data)) for length, tokens in tokens_by_length.items()}
    if unfinished is not None:  # once it is known that there will be something to keep
        parallel.from_first(partial(make_folder, unfinished.parent))
    scores = parallel.from_first(lambda: _go_on(unfinished, _nothing_measured(request, stack, tokens_by_length)))
    with ExitStack() as shown:
        total = sum(tokens_NT[:, 1:].numel() for tokens_NT in checked.values())
        progress = shown.enter_context(_TokensProgress(total)) if total and parallel.is_first() else None
        for length, tokens_NT in checked.items():
            if scores.attention is not None and str(length) in scores.attention.lengths:
                if progress is not None:
                    progress.skip_tokens(tokens_NT[:, 1:].numel())
                continue
            scores = _with_length(scores, stack, request, tokens_NT, length == max(checked), progress)
            if unfinished is not None:
                parallel.from_first(partial(write_atomically, unfinished, encode(scores)))
    return replace(scores, weight_sparsity=weight_sparsity(stack) if "weights" in request.what else None)


def _load(request: Request) -> dict[int, NDArray[np.int64]]:
    """Tokens [N, T + 1] by T, the shortest first."""
    if request.data is None or set(request.what) == {"weights"}:
        return {}
    loaded = [load_sequences(request.data, request.sequences, length) for length in request.lengths or (None,)]
    by_length = {tokens_NT.shape[1] - 1: tokens_NT for tokens_NT in loaded}
    wanted = sorted(by_length) if request.measures_attention else [max(by_length)]
    return {length: by_length[length] for length in wanted}


def _nothing_measured(request: Request, stack: Stack, tokens_by_length: dict[int, NDArray[np.int64]]) -> Scores:
    longest = max(tokens_by_length) if tokens_by_length else None
    tokens_NT = None if longest is None else tokens_by_length[longest]
    options = {"what": ",".join(name for name in WHAT if name in request.what)}
    if len(tokens_by_length) > 1:
        options["lengths"] = ",".join(map(str, tokens_by_length))
    return Scores(
        provenance=provenance_of(
            request.model,
            model_files(Path(request.model)),
            request.data,
            tokens_NT,
            dtype=request.dtype,
            device=stack.device,
            options=options,
        ),
        layers=stack.num_layers,
        sequences=None if tokens_NT is None else len(tokens_NT),
        length=longest,
    )


def _go_on(unfinished: Path | None, scores: Scores) -> Scores:
    """What an interrupted run of the same provenance has left, or else `scores`, which hold nothing yet."""
    if unfinished is None or not unfinished.exists():
        return scores
    left = read_scores(unfinished)
    return left if replace(left, attention=None, moments=None) == scores else scores


def _with_length(
    scores: Scores,
    stack: Stack,
    request: Request,
    tokens_NT: torch.Tensor,
    is_longest: bool,
    progress: _TokensProgress | None,
) -> Scores:
    """`scores` with attention over sequences of one length, and of the longest with moments."""
    length = tokens_NT.shape[1] - 1
    attention = AttentionMeter(stack) if request.measures_attention else None
    moments = MomentsMeter(stack) if "moments" in request.what and is_longest else None
    with ExitStack() as measuring:
        for meter in (attention, moments):
            if meter is not None:
                measuring.enter_context(meter.measuring())
        for batch_BS in _batches(tokens_NT[:, :-1]):
            hidden_SBD = stack.embed(batch_BS.to(stack.device))
            for layer in range(stack.num_layers):
                hidden_SBD = stack.layer(layer, hidden_SBD)
            if progress is not None:
                progress.advance(batch_BS.numel() * parallel.workers())
    if attention is not None:
        earlier = {} if scores.attention is None else scores.attention.lengths
        scores = replace(scores, attention=Attention(lengths=earlier | {str(length): attention.result()}))
    if moments is not None:
        scores = replace(scores, moments=moments.result(len(tokens_NT), length))
    return scores


def _batches(tokens_NS: torch.Tensor) -> Iterable[torch.Tensor]:
    """This worker's share."""
    mine_NS = tokens_NS[parallel.worker() :: parallel.workers()]
    return mine_NS.split(max(1, TOKENS_AT_A_TIME // tokens_NS.shape[1])) if len(mine_NS) else ()


def measure_into(folder: Path, request: Request) -> None:
    """Measure, write sparsity.json, sparsity.csv and figures, and print a table. Collective under torchrun."""
    unfinished = folder / f"{FILE}.unfinished.json"
    parallel.initialise(request.tensor, request.expert)
    scores = measure(request, unfinished)

    def write() -> None:
        write_scores(folder, scores, FILE)
        unfinished.unlink(missing_ok=True)
        figures = save_score_figures(folder / f"{FILE}.json", folder / "figures")
        print(f"{sparsity_table(scores)}\n\n{folder}: {FILE}.json, {FILE}.csv and {len(figures) // 2} figures")

    parallel.from_first(write)
