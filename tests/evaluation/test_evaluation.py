"""Evaluations across parallel layouts and interruptions, their baselines, and perplexity."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecod_mcore.evaluation.baselines import by_length, random_guess
from sparsecod_mcore.evaluation.likelihood import Likelihoods
from sparsecod_mcore.evaluation.results import Estimate, Evaluation, Item, read_evaluation
from sparsecod_mcore.evaluation.summary import summary
from sparsecod_mcore.scoring.engine import Engine
from sparsecod_mcore.scoring.plan import make_plan
from sparsecod_mcore.scoring.stack import load_stack
from sparsecod_mcore.scoring.work_file import WorkFiles
from tests.distributed.jobs import TORCHRUN, environment
from tests.evaluation.conftest import Example
from tests.evaluation.evaluate_job import main as evaluate_as_job
from tests.evaluation.harness import assert_same_items, evaluate, items_of
from tests.scoring.random_models import MOE, random_tokens, save_random_checkpoint


@pytest.mark.distributed
def test_parallel_layouts_agree(example: Example, checkpoint: Path, tmp_path: Path) -> None:
    """TP2 and DP2 of a dense model, TP2 and EP2 of one with experts and a padded vocabulary, against one process."""
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, random_tokens(5, 41, 500).numpy())
    wide = MOE | {"vocab_size": 2060, "padded_vocab_size": 2176, "max_position_embeddings": 160}
    save_random_checkpoint(wide, tmp_path / "moe.ckpt", std=0.1)
    usual = [str(tmp_path), str(example.task_data), str(example.tokenizer), str(tokens)]
    dense, moe = f"={checkpoint}", f"={tmp_path / 'moe.ckpt'}"
    evaluate_as_job(*usual, f"one:1:1{dense}", f"moe-one:1:1{moe}")
    words = [*TORCHRUN, "--nproc-per-node", "2", str(Path(__file__).with_name("evaluate_job.py")), *usual]
    words += [f"tp2:2:1{dense}", f"dp2:1:1{dense}", f"moe-tp2:2:1{moe}", f"moe-ep2:1:2{moe}"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("evaluation.json", "items.jsonl"):
        assert (tmp_path / "dp2" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    for name, reference in (("tp2", "one"), ("moe-tp2", "moe-one"), ("moe-ep2", "moe-one")):
        assert_same_items(items_of(tmp_path / name), items_of(tmp_path / reference), 1e-4)
        found, expected = (read_evaluation(tmp_path / folder / "evaluation.json") for folder in (name, reference))
        assert found.tasks == expected.tasks
        greedy, expected_greedy = (
            json.loads((tmp_path / folder / "greedy.json").read_text()) for folder in (name, reference)
        )
        assert greedy == expected_greedy and max(greedy) > 1088  # of both halves of the vocabulary
        assert found.perplexity is not None and expected.perplexity is not None
        assert found.perplexity.loss_by_position == pytest.approx(expected.perplexity.loss_by_position, rel=1e-5)


def test_an_interrupted_run_goes_on(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of likelihoods and of perplexity what was recorded is not run again; the end has the same bytes."""
    np.save(tmp_path / "tokens.npy", random_tokens(6, 65, 512).numpy())
    options = {"tasks": ["arc_easy", "perplexity"], "limit": 10, "batch_tokens": 128}
    options |= {"task_data": example.task_data, "data": str(tmp_path / "tokens.npy")}
    run: list[str] = []
    plain = WorkFiles.append
    monkeypatch.setattr(WorkFiles, "append", lambda *arguments: run.append(arguments[2]) or plain(*arguments))
    evaluate(example.hugging_face, tmp_path / "whole", **options)
    whole = list(run)

    def interrupt(files: WorkFiles, worker: int, unit: str, record: dict) -> None:
        plain(files, worker, unit, record)
        run.append(unit)
        if len(run) == len(whole) - 1:
            raise KeyboardInterrupt

    run.clear()
    monkeypatch.setattr(WorkFiles, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(example.hugging_face, tmp_path / "killed", **options)
    record = tmp_path / "killed" / "unfinished" / "worker-0.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"\0\xff\n" + b"".join(lines)[:-9])  # damage, and a line that was cut off
    run.clear()
    evaluate(example.hugging_face, tmp_path / "killed", **options)
    assert run == whole[-2:] and len(whole) > 10
    for name in ("evaluation.json", "items.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed" / "unfinished").exists()


def test_perplexity_of_the_reference(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260k"
    found = evaluate(folder, tmp_path, ["perplexity"], data=str(folder / "tokens.npy")).perplexity
    assert found is not None and (found.sequences, found.length) == (64, 256)
    assert found.loss.value == pytest.approx(1.315585237954237, rel=1e-6)  # expected_scores.json
    stack = load_stack(folder)
    tokens_NT = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    engine = Engine(stack, tokens_NT, make_plan(stack, (), 64, 256, None))
    assert found.loss.value == pytest.approx(engine.run_unchanged(()).loss / (64 * 256), rel=1e-6)

    hidden_SBD = stack.embed(tokens_NT[:, :-1])
    for layer in range(stack.num_layers):
        hidden_SBD = stack.layer(layer, hidden_SBD)
    losses_NT = stack.losses(hidden_SBD, tokens_NT[:, 1:]).double().numpy()
    assert found.loss.stderr == pytest.approx(losses_NT.mean(1).std(ddof=1) / 8)
    assert found.perplexity.value == pytest.approx(math.exp(losses_NT.mean()), rel=1e-6)
    assert found.perplexity.stderr == pytest.approx(found.perplexity.value * found.loss.stderr)
    assert found.loss_by_position == pytest.approx(losses_NT.mean(0), rel=1e-5)
    assert found.stderr_by_position == pytest.approx(losses_NT.std(0, ddof=1) / 8, rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def item(right: int, *characters: int) -> Item:
    count = len(characters)
    return Item(
        task="t",
        item=0,
        right=[right],
        log_likelihoods=[0.0] * count,
        is_greedy=[False] * count,
        characters=list(characters),
        metrics={"acc": 1.0},
    )


def test_baselines_are_those_counted_by_hand() -> None:
    # Longest: right; right in one of two; wrong; wrong. Shortest: wrong; wrong; wrong in one of two; right.
    items = [item(0, 9, 1, 2, 3), item(1, 5, 5, 1), item(2, 4, 7, 4, 5, 6), item(3, 8, 2, 2, 1)]
    chances = (1 / 4, 1 / 3, 1 / 5, 1 / 4)
    guess = random_guess(items)
    assert guess.value == pytest.approx(sum(chances) / 4)
    assert guess.stderr == pytest.approx(math.sqrt(3 / 16 + 2 / 9 + 4 / 25 + 3 / 16) / 4)
    longest, shortest = by_length(items, max), by_length(items, min)
    assert longest == Estimate.of_mean([1, 0.5, 0, 0]) and longest.value == 0.375
    assert longest.stderr == pytest.approx(np.std([1, 0.5, 0, 0], ddof=1) / 2)
    assert shortest.value == (0 + 0 + 0.5 + 1) / 4
    assert math.isnan(by_length(items[:1], max).stderr)
    both = replace(items[1], right=[0, 1])  # two that count as right
    assert (random_guess([both]).value, by_length([both], max).value) == (pytest.approx(2 / 3), 1.0)


def test_equal_inputs_go_through_the_model_once(example: Example, tmp_path: Path) -> None:
    """Answers of MMLU are a letter and differ in one token, so that some of a question's four have the same inputs."""
    row = '{"subject": "s", "question": "What %s?", "choices": ["a", "b", "c", "d"], "gold": %d}\n'
    (tmp_path / "mmlu_test.jsonl").write_text(row % ("now", 0) + row % ("then", 3))
    batches = []
    plain = Likelihoods._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Likelihoods, "_run", lambda self, batch: batches.append(batch) or plain(self, batch))
        found: Evaluation = evaluate(example.hugging_face, tmp_path, ["mmlu"], task_data=tmp_path)
    assert len(batches) == 1 and len(batches[0].rows) < len(batches[0].queries) == 8
    mmlu = found.tasks["mmlu"]
    assert (mmlu.metric, mmlu.items, mmlu.random_guess.value, mmlu.longest_choice.value) == ("acc", 2, 0.25, 0.25)
    assert len({*items_of(tmp_path)[0].log_likelihoods}) == 4
    table = summary(found).splitlines()
    assert table[0].split()[:4] == ["task", "metric", "items", "accuracy"]
    assert table[1].split()[:3] == ["mmlu", "acc", "2"] and table[1].count("25.00% ±") == 3
