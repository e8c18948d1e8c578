"""lm-eval's tasks run on a model: every item, and the accuracies that follow."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import lm_eval.api.task
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from sparsecod_mcore.evaluation.baselines import by_length, random_guess
from sparsecod_mcore.evaluation.results import Accuracy, Estimate, Item
from sparsecod_mcore.evaluation.task_list import Tasks

_REPORTED = ("acc_norm", "acc")  # the first that a task has; ARC and HellaSwag have both, MMLU the second


def run_tasks(model: LM, tasks: Tasks, limit: int | None) -> tuple[dict[str, Accuracy], list[Item]]:
    """Accuracy by the names asked for, and all items, the first `limit` of each task. Collective."""
    loaded = {"tasks": tasks.tasks, "groups": {}, "group_map": {}}
    with patch.object(lm_eval.api.task, "tqdm", lambda documents, total: documents):  # one bar is enough, ours
        found = evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    items: dict[str, list[Item]] = {}
    digests: dict[str, str] = {}
    for name, task in tasks.tasks.items():
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        items[name] = [_item(name, task, sample) for sample in samples]
        asked = [[sample["arguments"], item.right] for sample, item in zip(samples, items[name], strict=True)]
        digests[name] = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    accuracies = {
        name: _accuracy([item for member in members for item in items[member]], [digests[m] for m in members])
        for name, members in tasks.members.items()
    }
    return accuracies, [item for name in items for item in items[name]]


def _item(name: str, task: Any, sample: Mapping[str, Any]) -> Item:
    document = sample["doc"]
    choices = task.doc_to_choice(document)
    target = task.doc_to_text(document) if task.multiple_input else sample["target"]
    targets = target if isinstance(target, list) else [target]
    answers = sample["filtered_resps"][: len(choices)]  # some metrics ask for more than that
    return Item(
        task=name,
        item=sample["doc_id"],
        right=[choices.index(target) if isinstance(target, str) else int(target) for target in targets],
        log_likelihoods=[log_likelihood for log_likelihood, _ in answers],
        is_greedy=[is_greedy for _, is_greedy in answers],
        characters=[len(choice) for choice in choices],
        metrics={metric: float(sample[metric]) for metric in sample["metrics"] if metric.startswith("acc")},
    )


def _accuracy(items: Sequence[Item], digests: Sequence[str]) -> Accuracy:
    metrics = {name: Estimate.of_mean([item.metrics[name] for item in items]) for name in items[0].metrics}
    return Accuracy(
        items=len(items),
        items_sha256=digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        metric=next(name for name in _REPORTED if name in metrics),
        metrics=metrics,
        random_guess=random_guess(items),
        longest_choice=by_length(items, max),
        shortest_choice=by_length(items, min),
    )
