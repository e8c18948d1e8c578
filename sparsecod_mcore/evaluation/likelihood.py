"""Log-likelihoods of tokens that go on from others, in batches of about the same length.

Axes: S positions, B sequences, N tokens to predict, D hidden width.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.evaluation.units import Record, run_units, tokens_at_once
from sparsecod_mcore.evaluation.vocabulary import predictions
from sparsecod_mcore.scoring.stack import Stack
from sparsecod_mcore.scoring.work_file import WorkFiles


class Query(NamedTuple):
    """Tokens that go in, the last ``len(targets)`` of which have to predict `targets`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class Score(NamedTuple):
    """Of a query's targets: the sum of their log-probabilities, and whether each was the most probable token."""

    log_likelihood: float
    is_greedy: bool


def make_query(context: Sequence[int], continuation: Sequence[int], max_positions: int) -> Query:
    """Predict `continuation` after `context`, of which the beginning is left out where it is too long.

    Raises `UserError` for a continuation that is itself longer than `max_positions`.
    """
    assert context and continuation
    if len(continuation) > max_positions:
        raise UserError(
            f"a continuation of {len(continuation)} tokens is to be predicted, which the model's {max_positions} "
            "positions do not hold"
        )
    whole = (*context, *continuation)[-(max_positions + 1) :]
    return Query(whole[:-1], tuple(continuation))


@dataclass(frozen=True)
class _Batch:
    """Sequences that go through the model side by side, each with all that it has to predict."""

    rows: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]

    @property
    def name(self) -> str:
        """The same for the same tokens, whatever else there is."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    @property
    def queries(self) -> list[Query]:
        return [Query(inputs, targets) for inputs, alternatives in self.rows for targets in alternatives]

    @property
    def tokens(self) -> int:
        """What the model is given, padding included."""
        return len(self.rows) * max(len(inputs) for inputs, _ in self.rows)


def _batches(queries: Iterable[Query], most_tokens: int) -> list[_Batch]:
    """The longest sequences first; those of equal inputs, as questions with answers of one token have, only once."""
    alternatives: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for query in queries:
        alternatives.setdefault(query.inputs, set()).add(query.targets)
    batches: list[_Batch] = []
    rows: list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = []
    for inputs in sorted(alternatives, key=lambda inputs: (-len(inputs), inputs)):
        if rows and (len(rows) + 1) * len(rows[0][0]) > most_tokens:
            batches.append(_Batch(tuple(rows)))
            rows = []
        rows.append((inputs, tuple(sorted(alternatives[inputs]))))
    return [*batches, _Batch(tuple(rows))] if rows else batches


class Likelihoods:
    """One model that queries are put to."""

    def __init__(self, stack: Stack, batch_tokens: int | None = None, files: WorkFiles[Record] | None = None) -> None:
        """`files` keep what is done, and know what was."""
        self.stack = stack
        self._tokens_at_once, self._files = tokens_at_once(stack, batch_tokens), files

    def score(self, queries: Sequence[Query]) -> list[Score]:
        """The score of each query, in their order. Collective, with the same result on every rank."""
        batches = {batch.name: batch for batch in _batches(queries, self._tokens_at_once)}
        records = run_units("evaluating", batches, self._run, lambda batch: batch.tokens, self._files)
        scores: dict[Query, Score] = {}
        for name, batch in batches.items():
            record = records[name]
            pairs = zip(record["log_likelihoods"], record["is_greedy"], strict=True)
            scores |= {query: Score(*pair) for query, pair in zip(batch.queries, pairs, strict=True)}
        return [scores[query] for query in queries]

    def _run(self, batch: _Batch) -> Record:
        stack = self.stack
        tokens_BS = torch.zeros(len(batch.rows), max(len(inputs) for inputs, _ in batch.rows), dtype=torch.int64)
        places: list[tuple[int, int]] = []  # (position, sequence) of what predicts each target
        for row, (inputs, alternatives) in enumerate(batch.rows):
            tokens_BS[row, : len(inputs)] = torch.tensor(inputs)  # what follows is seen by no token of these
            for targets in alternatives:
                places += [(position, row) for position in range(len(inputs) - len(targets), len(inputs))]
        hidden_SBD = stack.embed(tokens_BS.to(stack.device))
        for layer in range(stack.num_layers):
            hidden_SBD = stack.layer(layer, hidden_SBD)
        position_N, row_N = torch.tensor(places, device=stack.device).T
        queries = batch.queries
        targets_N = torch.tensor([token for query in queries for token in query.targets], device=stack.device)
        log_probability_N, most_probable_N = predictions(stack, hidden_SBD[position_N, row_N], targets_N)
        lengths = [len(query.targets) for query in queries]
        is_most_probable_N = most_probable_N == targets_N
        return {
            "log_likelihoods": [part.sum().item() for part in log_probability_N.double().split(lengths)],
            "is_greedy": [bool(part.all()) for part in is_most_probable_N.split(lengths)],
        }
