"""The same model through this project's adapter and through lm-eval's own ``hf`` model: the same answers."""

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.evaluation.accuracy import run_tasks
from sparsecod_mcore.evaluation.adapter import CheckpointLM
from sparsecod_mcore.evaluation.task_list import load_tasks
from tests.evaluation.conftest import Example
from tests.evaluation.harness import assert_same_items, evaluate, items_of, of_lm_eval


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "hellaswag"])
@pytest.mark.parametrize("limit", [20, pytest.param(200, marks=pytest.mark.long)])
def test_answers_are_those_of_lm_eval(
    example: Example, checkpoint: Path, exported: Example, tmp_path: Path, task: str, limit: int
) -> None:
    """To the first questions of a task, from a Hugging Face directory and from a checkpoint of Megatron's.

    lm-eval's model reads what was exported of that checkpoint.
    """
    usual: dict[str, Any] = {"tasks": [task], "task_data": example.task_data, "limit": limit}
    found = evaluate(example.hugging_face, tmp_path / "hf", **usual)
    from_checkpoint = evaluate(checkpoint, tmp_path / "checkpoint", tokenizer=example.tokenizer, **usual)
    expected, expected_items = run_tasks(of_lm_eval(exported), load_tasks([task], example.task_data), limit)
    assert found.tasks == from_checkpoint.tasks == expected
    assert expected[task].items == limit and 0 < expected[task].metrics["acc_norm"].value < 1
    for name in ("hf", "checkpoint"):
        assert_same_items(items_of(tmp_path / name), expected_items, 1e-4)


def test_texts_are_those_of_lm_eval(example: Example) -> None:
    """Texts of several windows, none or one token of context, and texts that begin as prompts do."""
    # Its cache takes texts of equal tokens, differently parted into context and continuation, for parted alike.
    theirs = of_lm_eval(example, logits_cache=False)
    ours = get_model("sparsecod").create_from_arg_obj({"model": str(example.hugging_face)}, {"batch_size": 1})
    assert isinstance(ours, CheckpointLM)
    assert (ours.max_length, ours.prefix_token_id, ours.eot_token_id) == (160, 2047, 0)
    assert (theirs.max_length, theirs.prefix_token_id, theirs.eot_token_id) == (160, 2047, 0)
    long = "Once upon a time there was a little girl. She liked to play in the garden with her dog. " * 30
    pairs = [("", "Once upon"), ("", "<s>Once"), ("<s>Once", " upon a time"), ("Once ", "upon"), (long, " The end")]
    pairs += [("a<|endoftext|>b", " c"), ("The", " cat"), ("The", " dog")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for one, other in zip(ours.loglikelihood(requests), expected, strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-4)
    tokens = ours.tok_encode(long)[:20]
    best = theirs._model_call(torch.tensor([tokens])).argmax(-1)[0].tolist()
    asked = [(None, tokens[: n + 1], [token]) for n, token in enumerate(best)]
    assert [is_greedy for _, is_greedy in ours._loglikelihood_tokens(asked)] == [True] * 20
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (long, "The end.")]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-5
    )
    with pytest.raises(UserError, match=r"a continuation of \d+ tokens"):
        ours.loglikelihood([Instance("loglikelihood", {}, ("The", long), 0)])
    with pytest.raises(UserError, match="likelihoods only"):
        ours.generate_until([])


MMLU = [
    {"subject": "abstract_algebra", "question": " Which? ", "choices": ["a b", "c", "d", "e"], "answer": 3},
    {"subject": "high_school_world_history", "question": "Who?", "choices": ["w", "x", "y", "z"], "answer": 0},
]


def test_prompts_are_those_of_lm_eval(example: Example, tmp_path: Path) -> None:
    """A local task and lm-eval's own, which is given the same questions in the columns of the hub's data."""
    rows = [{**row, "gold": row["answer"]} for row in MMLU]
    (tmp_path / "mmlu_test.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    [mmlu] = load_tasks(["mmlu"], tmp_path).tasks.values()
    for index, row in enumerate(MMLU):
        of_subject = _as_of_hub(f"mmlu/default/mmlu_{row['subject']}.yaml", {"test": [row], "dev": [row]})
        assert _asked(mmlu)[4 * index : 4 * index + 4] == _asked(of_subject)

    arc = load_tasks(["arc_easy", "arc_challenge"], example.task_data).tasks
    for name, task in arc.items():
        with gzip.open(example.task_data / f"{name}_test.jsonl.gz", "rt") as file:
            questions = [json.loads(line) for line in islice(file, 50)]
        labels = [list("ABCDE"[: len(row["choices"])]) for row in questions]
        hub = [
            {
                "question": row["question"],
                "choices": {"text": row["choices"], "label": label},
                "answerKey": label[row["gold"]],
            }
            for row, label in zip(questions, labels, strict=True)
        ]
        expected = _asked(_as_of_hub(f"arc/{name}.yaml", {"train": hub, "validation": hub, "test": hub}))
        assert _asked(task)[: len(expected)] == expected

    raw = {"activity_label": "Cooking", "ctx_a": "[header] How to [title] Boil  it.", "ctx_b": "he", "label": "2"}
    raw |= {"endings": ["pours [step] water.", "a", "b  b", "c"]}
    row = {"query": "Cooking: [header] How to [title] Boil  it. He", "endings": raw["endings"], "gold": 2}
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(row))
    [hellaswag] = load_tasks(["hellaswag"], tmp_path).tasks.values()
    assert _asked(hellaswag) == _asked(_as_of_hub("hellaswag/hellaswag.yaml", {"train": [raw], "validation": [raw]}))


def _as_of_hub(config: str, splits: dict[str, list[dict[str, Any]]]) -> ConfigurableTask:
    loaded = load_yaml(Path(lm_eval.tasks.__file__).parent / config)
    loaded.pop("tag", None)
    datasets = {name: Dataset.from_list(rows) for name, rows in splits.items()}
    return ConfigurableTask(config={**loaded, "custom_dataset": lambda **_: datasets, "num_fewshot": 0})


def _asked(task: ConfigurableTask) -> list[tuple[Any, ...]]:
    """Contexts, continuations and the right choice, choice by choice."""
    task.build_all_requests()
    return [(*request.args, task.doc_to_target(request.doc)) for request in task.instances]
