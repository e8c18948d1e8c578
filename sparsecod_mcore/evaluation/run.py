"""From a model to its evaluation."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.evaluation import task_list
from sparsecod_mcore.evaluation.likelihood import Likelihoods
from sparsecod_mcore.evaluation.perplexity import perplexity
from sparsecod_mcore.evaluation.results import FILE, ITEMS_FILE, Accuracy, Evaluation, Item, write_evaluation
from sparsecod_mcore.evaluation.summary import summary
from sparsecod_mcore.evaluation.task_list import PERPLEXITY, Tasks
from sparsecod_mcore.evaluation.tokenizer import PromptTokenizer, find_tokenizer, load_prompt_tokenizer
from sparsecod_mcore.evaluation.units import Record
from sparsecod_mcore.scoring import parallel
from sparsecod_mcore.scoring.provenance import provenance_of
from sparsecod_mcore.scoring.results import Provenance
from sparsecod_mcore.scoring.run import DTYPES
from sparsecod_mcore.scoring.sequences import check_sequences, load_sequences
from sparsecod_mcore.scoring.stack import Stack, load_stack, model_files
from sparsecod_mcore.scoring.work_file import WorkFiles, alone_in


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated, and how."""

    model: str
    tasks: Sequence[str]
    out: Path
    task_data: Path | None = None  # folder of local questions; None for the hub
    tokenizer: Path | None = None  # None for the model's own
    eos_token: str | None = None
    limit: int | None = None  # items of each task
    data: str | None = None  # of perplexity
    sequences: int | None = None
    length: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor: int = 1  # parallel size
    expert: int = 1  # parallel size
    batch_tokens: int | None = None

    @property
    def questions(self) -> list[str]:
        """The tasks that are lm-eval's."""
        return [name for name in self.tasks if name != PERPLEXITY]

    def check(self) -> None:
        """Raises `UserError` for what cannot be."""
        if self.questions:
            try:
                version("lm_eval")
            except PackageNotFoundError:
                raise UserError(
                    f"{', '.join(self.questions)} need lm-eval: pip install -c constraints.txt lm-eval "
                    f"({PERPLEXITY} does not)"
                ) from None
        task_list.check_names(self.tasks, self.task_data)
        if PERPLEXITY in self.tasks and self.data is None:
            raise UserError("--data is needed for perplexity: .npy of tokens, or what tools/preprocess_data.py made")
        for name, value in (("limit", self.limit), ("batch-tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is given, 1 or more is accepted")


def evaluate_model(request: Request) -> Evaluation:
    """Evaluate the model and write evaluation.json and items.jsonl.

    After an interruption the same call goes on from the batches that were recorded. Collective under torchrun.
    Raises `UserError` for what the user can mend, before anything is computed.
    """
    request.check()
    parallel.initialise(request.tensor, request.expert)
    tokens_NT = None
    if PERPLEXITY in request.tasks:
        tokens_NT = load_sequences(str(request.data), request.sequences, request.length)
    tokenizer = None
    if request.questions:
        tokenizer = load_prompt_tokenizer(find_tokenizer(Path(request.model), request.tokenizer), request.eos_token)
    tasks = task_list.load_tasks(request.questions, request.task_data) if request.questions else None
    stack = load_stack(Path(request.model), DTYPES[request.dtype], tensor=request.tensor, expert=request.expert)
    if tokenizer is not None:
        tokenizer.check(stack.vocab_size, request.model)
    tokens = None if tokens_NT is None else check_sequences(tokens_NT, stack, str(request.data))
    work = request.out / "unfinished"
    with ExitStack() as held:
        parallel.from_first(lambda: held.enter_context(alone_in(work)))
        provenance = parallel.from_first(lambda: _provenance(request, stack, tokenizer, tokens_NT))
        files: WorkFiles[Record] = WorkFiles(work, _fingerprint(request, provenance))
        evaluation, items = _evaluate(request, stack, tasks, tokenizer, tokens, provenance, files)
        parallel.from_first(lambda: _write(request.out, evaluation, items, files))
    return evaluation


def _evaluate(
    request: Request,
    stack: Stack,
    tasks: Tasks | None,
    tokenizer: PromptTokenizer | None,
    tokens_NT: torch.Tensor | None,
    provenance: Provenance,
    files: WorkFiles[Record],
) -> tuple[Evaluation, list[Item]]:
    accuracies: dict[str, Accuracy] = {}
    items: list[Item] = []
    if tasks is not None and tokenizer is not None:
        from sparsecod_mcore.evaluation.accuracy import run_tasks  # needs lm-eval
        from sparsecod_mcore.evaluation.adapter import StackLM

        model = StackLM(Likelihoods(stack, request.batch_tokens, files), tokenizer)
        accuracies, items = run_tasks(model, tasks, request.limit)
    found = None if tokens_NT is None else perplexity(stack, tokens_NT, request.batch_tokens, files)
    return Evaluation(provenance=provenance, tasks=accuracies, perplexity=found), items


def _provenance(
    request: Request, stack: Stack, tokenizer: PromptTokenizer | None, tokens_NT: NDArray[np.int64] | None
) -> Provenance:
    options = {"shots": "0", "limit": "none" if request.limit is None else str(request.limit)}
    if tokenizer is not None:
        options["tokenizer_sha256"] = tokenizer.text.sha256
    found = provenance_of(
        request.model,
        model_files(Path(request.model)),
        request.data,
        tokens_NT,
        dtype=request.dtype,
        device=stack.device,
        options=options if request.questions else {},
    )
    if request.questions:
        found = replace(found, versions=found.versions | {name: version(name) for name in ("lm_eval", "tokenizers")})
    return found


def _fingerprint(request: Request, provenance: Provenance) -> str:
    """Of what a batch's figures depend on beside its tokens."""
    layout = {"tensor": request.tensor, "expert": request.expert}
    made_from = [provenance.model_sha256, provenance.dtype, provenance.device, provenance.versions, layout]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _write(out: Path, evaluation: Evaluation, items: Sequence[Item], files: WorkFiles[Record]) -> None:
    write_evaluation(out, evaluation, items)
    files.remove()


def evaluate_and_show(request: Request) -> None:
    """`evaluate_model`, and a table on the screen. Collective under torchrun."""
    evaluation = evaluate_model(request)

    def show() -> None:
        made = f"{FILE} and {ITEMS_FILE}" if evaluation.tasks else FILE
        print(f"{summary(evaluation)}\n{request.out}: {made}")

    parallel.from_first(show)
