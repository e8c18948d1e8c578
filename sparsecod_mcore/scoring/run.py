"""From a model and tokens to its scores."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.report.score_figures import save_score_figures
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.engine import Engine, Unchanged
from sparsecod_mcore.scoring.interventions import by_first
from sparsecod_mcore.scoring.plan import Plan, make_plan
from sparsecod_mcore.scoring.provenance import provenance_of
from sparsecod_mcore.scoring.registry import check_names, make_scores, names_for
from sparsecod_mcore.scoring.results import Provenance, Scores, write_scores
from sparsecod_mcore.scoring.score import Measured, Options, Score
from sparsecod_mcore.scoring.sequences import check_sequences, load_sequences
from sparsecod_mcore.scoring.stack import Stack, load_stack, model_files
from sparsecod_mcore.scoring.summary import summary
from sparsecod_mcore.scoring.work_file import UnitSums, WorkFiles, alone_in

DTYPES: dict[Literal["float32", "bfloat16"], torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be scored, and how."""

    model: str
    data: str
    names: Sequence[str] | None  # None: all that the model has
    out: Path
    sequences: int | None = None
    length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor: int = 1  # parallel size
    expert: int = 1  # parallel size
    budget: int | None = None  # bytes beside the model's own
    options: Options = field(default_factory=Options)


def score_model(request: Request, *, draw: bool = False) -> Scores:
    """Score the model and write scores.json and scores.csv, and figures if asked to `draw`.

    After an interruption the same call runs all again but the interventions that were recorded.
    Collective under torchrun. Raises `UserError` for what the user can mend, before anything is computed.
    """
    if request.names is not None:
        check_names(request.names)
    if request.options.jacobian_sequences < 1:
        raise UserError(
            f"Jacobians of {request.options.jacobian_sequences} sequences are asked for; 1 or more are accepted"
        )
    tokens_NT = load_sequences(request.data, request.sequences, request.length)
    stack = load_stack(Path(request.model), DTYPES[request.dtype], tensor=request.tensor, expert=request.expert)
    tokens = check_sequences(tokens_NT, stack, request.data)
    if stack.num_layers < 2:
        raise UserError(f"{request.model} has one layer; scores compare layers, so two or more are needed")
    names = names_for(stack) if request.names is None else request.names
    scores = make_scores(names, stack, request.options)
    plan = make_plan(stack, scores, len(tokens), tokens.shape[1] - 1, request.budget)
    work = request.out / "unfinished"
    with ExitStack() as held:
        parallel.from_first(lambda: held.enter_context(alone_in(work)))
        provenance = parallel.from_first(lambda: _provenance(request, names, stack, tokens_NT))
        files: WorkFiles[UnitSums] = WorkFiles(work, _fingerprint(request, names, plan, provenance))
        measured = _measure(stack, tokens, plan, scores, files)
        found = Scores(
            provenance=provenance,
            layers=stack.num_layers,
            sequences=len(tokens),
            length=tokens.shape[1] - 1,
            loss=measured.loss,
            **measured.finished,
        )
        parallel.from_first(lambda: _write(request.out, found, files, draw))
    return found


def _measure(
    stack: Stack, tokens: torch.Tensor, plan: Plan, scores: Sequence[Score], files: WorkFiles[UnitSums]
) -> Measured:
    """Run the model as it is and under all interventions, and finish every score."""
    engine = Engine(stack, tokens, plan)
    unchanged = engine.run_unchanged(scores)
    groups = by_first(item for score in scores for item in score.interventions())
    measured = means(stack, tokens, unchanged, engine.run_units(groups, files))
    for score in scores:
        measured.finished[score.name] = score.result(measured)
    return measured


def _provenance(request: Request, names: Sequence[str], stack: Stack, tokens_NT: NDArray[np.int64]) -> Provenance:
    given = request.options
    options: dict[str, str] = {"compat": given.compat, "pairs": _count_of("sample", given.sampled_pairs)}
    if "jacobian" in names:
        options |= {"jacobian_sequences": str(min(given.jacobian_sequences, len(tokens_NT)))}
        options |= {"jacobian": _count_of("probes", given.jacobian_probes)}
    return provenance_of(
        request.model,
        model_files(Path(request.model)),
        request.data,
        tokens_NT,
        dtype=request.dtype,
        device=stack.device,
        options=options,
        seed=request.options.seed,
    )


def _count_of(kind: str, count: int | None) -> str:
    return "all" if count is None else f"{kind}:{count}"


def _fingerprint(request: Request, names: Sequence[str], plan: Plan, provenance: Provenance) -> str:
    """Of what a unit's figures depend on."""
    layout = {"tensor": request.tensor, "expert": request.expert, "scores": sorted(names)}
    made_from: list[Any] = [asdict(plan), asdict(replace(provenance, model="", data=None)), layout]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def means(stack: Stack, tokens_NT: torch.Tensor, unchanged: Unchanged, units: Sequence[UnitSums]) -> Measured:
    """From sums to means over all tokens."""
    count = tokens_NT[:, 1:].numel()
    losses: dict[str, float] = {}
    changes: dict[str, list[float]] = {}
    for unit in units:
        for name, loss in unit["losses"].items():
            losses[name] = losses.get(name, 0.0) + loss
        for name, added in unit["changes"].items():
            sums = changes.setdefault(name, [0.0] * len(added))
            changes[name] = [a + b for a, b in zip(sums, added, strict=True)]
    return Measured(
        stack=stack,
        tokens_NT=tokens_NT,
        loss=unchanged.loss / count,
        contributions_L=[value / count for value in unchanged.contributions_L],
        losses={name: loss / count for name, loss in losses.items()},
        changes={name: [value / count for value in values] for name, values in changes.items()},
        finished={},
    )


def _write(out: Path, scores: Scores, files: WorkFiles[UnitSums], draw: bool) -> None:
    write_scores(out, scores)
    if draw:
        save_score_figures(out / "scores.json", out / "figures")
    files.remove()  # last: until then the same call goes on


def score_and_show(request: Request) -> None:
    """`score_model`, figures of what it found, and a summary on the screen. Collective under torchrun."""
    scores = score_model(request, draw=True)

    def show() -> None:
        figures = list((request.out / "figures").glob("*.svg"))
        print(f"{summary(scores)}\n{request.out}: scores.json, scores.csv and {len(figures)} figures")

    parallel.from_first(show)
