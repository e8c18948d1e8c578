"""What a user can get wrong: exit code 2 and one sentence, before anything is computed."""

import json
import re
import runpy
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.evaluation import run
from sparsecod_mcore.evaluation.task_list import check_kind, check_names, load_tasks
from tests.distributed.jobs import REPOSITORY
from tests.scoring.random_models import GQA, random_tokens, save_random_checkpoint

TOOL = str(REPOSITORY / "tools" / "evaluate.py")
ROW = {"question": "Why?", "choices": ["a", "b"], "gold": 1}

# What is wrong in the second of two rows of arc_easy_test.jsonl.
ROWS = {
    "no choices": ({"question": "Why?", "gold": 1}, "line 2: it has no 'choices', and question, choices, gold are"),
    "one choice": (ROW | {"choices": ["a"]}, "line 2: 'choices' is no list of two choices or more"),
    "an empty choice": (ROW | {"choices": ["a", " "]}, "line 2: 'choices' has a choice that is no text"),
    "no question": (ROW | {"question": 7}, "line 2: 'question' is no text"),
    "gold outside": (ROW | {"gold": 2}, "line 2: 'gold' is 2, not the index of one of 2 choices"),
    "gold in letters": (ROW | {"gold": "B"}, "line 2: 'gold' is 'B', not the index"),
    "a list": ([ROW], "line 2: no JSON object"),
    "cut off": ('{"question": ', "line 2: no valid JSON ("),
}
MISTAKES = {
    "misspelt": (
        "--tasks arc_esay",
        "'arc_esay' is no task with local data (did you mean 'arc_easy'?); arc_challenge,",
    ),
    "twice": ("--tasks arc_easy,arc_easy", "the task 'arc_easy' is named twice"),
    "none": ("--tasks ,", "no task is named; arc_easy, arc_challenge, hellaswag, mmlu, perplexity are those of"),
    "no file": ("--tasks hellaswag --tokenizer {tokenizer}", "holds no hellaswag_val.jsonl, nor that as .gz or .zst"),
    "no folder": ("--task-data nowhere --tokenizer {tokenizer}", "--task-data nowhere is no folder"),
    "three choices": (
        "--tasks mmlu --tokenizer {tokenizer}",
        "mmlu_test.jsonl, line 1: 'choices' has 3 choices, this task is of 4",
    ),
    "no tokenizer": ("", "model comes without a tokenizer; --tokenizer names one"),
    "a lost tokenizer": ("--model {run}", "config.yaml names the tokenizer gone.json, which is not there"),
    "no such tokenizer": ("--tokenizer nowhere.json", "the tokenizer nowhere.json cannot be read"),
    "another vocabulary": ("--tokenizer {tokenizer}", "the tokenizer has 98 tokens, more than the vocabulary of 97"),
    "another end": ("--tokenizer {tokenizer} --eos-token <end>", "has no token '<end>'"),
    "no data": ("--tasks perplexity", "--data is needed for perplexity"),
    "foreign tokens": ("--tasks perplexity --data {foreign}", "token 97, outside of the model's vocabulary of 97"),
    "limit": ("--limit 0", "--limit 0 is given, 1 or more is accepted"),
    "batch": ("--batch-tokens -5", "--batch-tokens -5 is given, 1 or more is accepted"),
    "layout": ("--tensor-parallel-size 2", "1 processes are not divisible by tensor x expert parallel size 2 x 1"),
    "no model": ("--model nowhere --tokenizer {tokenizer}", "nowhere does not exist"),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Good files, and others that are bad in one way each."""
    place = {name: tmp_path / name for name in ("model", "run", "tokenizer.json", "foreign.npy")}
    save_random_checkpoint(GQA, place["model"])
    place["run"].mkdir()
    (place["run"] / "config.yaml").write_text("cod:\n  tokenizer: gone.json\n")
    vocabulary = {"<|endoftext|>": 0} | {f"word{index}": index for index in range(1, 98)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word1"}
    place["tokenizer.json"].write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    np.save(place["foreign.npy"], random_tokens(2, 33).numpy() // 96 * 97)
    (tmp_path / "arc_easy_test.jsonl").write_text(json.dumps(ROW) + "\n")
    mmlu = {"subject": "x", "question": "y", "choices": ["a", "b", "c"], "gold": 0}
    (tmp_path / "mmlu_test.jsonl").write_text(json.dumps(mmlu))
    return {name.partition(".")[0]: path for name, path in place.items()}


def test_mistakes_are_told_in_one_sentence(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = f"--model {places['model']} --tasks arc_easy --task-data {tmp_path} --out {tmp_path / 'out'}"

    def assert_complains(mistake: str, flags: str, complaint: str) -> None:
        monkeypatch.setattr(sys, "argv", [TOOL, *usual.split(), *flags.format(**places).split()])
        code = 0
        try:
            runpy.run_path(TOOL, run_name="__main__")
        except SystemExit as end:
            code = end.code
        sentences = re.findall(r"^error: (.*)$", capsys.readouterr().err, re.MULTILINE)
        assert code == 2 and len(sentences) == 1 and complaint in sentences[0], f"{mistake}: {sentences}"

    for mistake, (flags, complaint) in MISTAKES.items():
        assert_complains(mistake, flags, complaint)
    for mistake, (row, complaint) in ROWS.items():
        second = row if isinstance(row, str) else json.dumps(row)
        (tmp_path / "arc_easy_test.jsonl").write_text(f"{json.dumps(ROW)}\n{second}\n")
        assert_complains(mistake, "--tokenizer {tokenizer}", complaint)

    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(run, "version", not_installed)
    assert_complains("no lm-eval", "", "arc_easy need lm-eval: pip install -c constraints.txt lm-eval")
    assert not (tmp_path / "out").exists()


def test_tasks_of_lm_eval_that_are_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^'helaswag' is no task of lm-eval \(did you mean 'hellaswag'\?\)"):
        check_names(["perplexity", "helaswag"], None)
    (tmp_path / "arc_easy_test.jsonl").write_text(json.dumps(ROW) + "\n")
    task = load_tasks(["arc_easy"], tmp_path).tasks["arc_easy"]
    check_kind("fine", task)
    ways = {
        "_metric_fn_list": ({"brier_score": None}, "'other' counts no right answers, but scores them in a way of its"),
        "OUTPUT_TYPE": ("generate_until", "'other' is a task of type generate_until, and multiple_choice ones are"),
    }
    for attribute, (value, complaint) in ways.items():
        with monkeypatch.context() as other, pytest.raises(UserError, match=complaint):
            other.setattr(task, attribute, value)
            check_kind("other", task)
    task.set_config("process_results", lambda document, results: {"acc": 1.0})  # as truthfulqa_mc2 has
    with pytest.raises(UserError, match="'own' counts no right answers, but scores them in a way of its own"):
        check_kind("own", task)
