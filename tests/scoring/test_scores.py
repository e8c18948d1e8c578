"""Scores against the reference's, and across parallel layouts, interruptions and memory budgets."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.scoring import plan
from sparsecod_mcore.scoring.interventions import ZeroExperts
from sparsecod_mcore.scoring.registry import DEFAULT_SCORES, make_scores, names_for
from sparsecod_mcore.scoring.results import Scores, read_scores
from sparsecod_mcore.scoring.run import Request, score_model
from sparsecod_mcore.scoring.score import Options
from sparsecod_mcore.scoring.stack import load_stack
from sparsecod_mcore.scoring.work_file import alone_in
from tests.distributed.jobs import REPOSITORY, TORCHRUN, environment
from tests.scoring.compare import assert_reproduced, assert_same_figures
from tests.scoring.random_models import GQA, MOE, random_tokens, save_as_megatron, save_random_checkpoint

TOOL = str(REPOSITORY / "tools" / "score_layers.py")
EVERY = ",".join(DEFAULT_SCORES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the jobs have; and on a busy machine threads of small models wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def score(model: Path, data: Path, out: Path, names: str = EVERY, **options: object) -> Scores:
    return score_model(Request(model=str(model), data=str(data), names=names.split(","), out=out, **options))


def test_the_reference_is_reproduced(tmp_path: Path, shared_data: Path) -> None:
    """Every figure of expected_scores.json, by the tool's default scores, to 1e-4 relative."""
    folder = shared_data / "stories260k"
    expected = json.loads((folder / "expected_scores.json").read_text())
    scores = score(folder, folder / "tokens.npy", tmp_path)
    assert read_scores(tmp_path / "scores.json") == scores
    assert_reproduced(scores, expected)
    assert scores.effective_depth is not None and scores.usefulness is not None
    assert (scores.effective_depth.effective, scores.effective_depth.wasted) == (5, 0)
    assert scores.usefulness.held_out is not None
    # Fitted on half the sequences, and on none of those that are scored: a little worse, never better.
    for other, same in zip(
        scores.usefulness.held_out.relative_loss_increase, scores.usefulness.scored.relative_loss_increase, strict=True
    ):
        assert same < other < 1.1 * same
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.json"]


@pytest.mark.distributed
def test_parallel_layouts_agree(tmp_path: Path, shared_data: Path) -> None:
    """A checkpoint at TP2 and DP2, and one with experts at TP2, EP2 and DP2, against the same model in one process."""
    pretrained = shared_data / "stories260k"
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.load(pretrained / "tokens.npy")[:5, :49])  # an odd number, in two halves
    moe_tokens = tmp_path / "moe.npy"
    np.save(moe_tokens, random_tokens(3, 40).numpy())
    expected = score(pretrained, tokens, tmp_path / "dense")
    save_as_megatron(pretrained, tmp_path / "dense.ckpt")
    save_random_checkpoint(MOE, tmp_path / "moe.ckpt")
    moe_scores = "skip,moe,usefulness"
    moe_expected = score(tmp_path / "moe.ckpt", moe_tokens, tmp_path / "moe", moe_scores)
    dense, moe = f"{tmp_path / 'dense.ckpt'}={tokens}", f"{tmp_path / 'moe.ckpt'}={moe_tokens}"
    words = [*TORCHRUN, "--nproc-per-node", "2", str(Path(__file__).with_name("score_job.py")), str(tmp_path)]
    words += [f"tp2:2:1:{EVERY}={dense}", f"dp2:1:1:{EVERY}={dense}"]
    words += [f"hf-tp2:2:1:{EVERY}={pretrained}={tokens}"]
    words += [f"moe-{layout}:{moe_scores}={moe}" for layout in ("tp2:2:1", "ep2:1:2", "dp2:1:1")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("tp2", "hf-tp2", "dp2"):
        assert_same_figures(read_scores(tmp_path / name / "scores.json"), expected, 1e-5)
    for name in ("moe-tp2", "moe-ep2", "moe-dp2"):
        assert_same_figures(read_scores(tmp_path / name / "scores.json"), moe_expected, 1e-5)


@pytest.fixture
def random_model(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of a GQA model, and tokens."""
    save_random_checkpoint(GQA | {"num_layers": 5}, tmp_path / "model")
    np.save(tmp_path / "tokens.npy", random_tokens(8, 65).numpy())
    return tmp_path / "model", tmp_path / "tokens.npy"


def test_a_killed_run_goes_on(random_model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 between two units; the second run measures only the rest, and ends with the same bytes."""
    model, tokens = random_model
    slow = tmp_path / "slow.py"  # the tool, with time to be killed between two units
    slow.write_text(
        "import runpy, time\n"
        "from sparsecod_mcore.scoring import work_file\n"
        "append = work_file.WorkFiles.append\n"
        "def slowly(*arguments):\n"
        "    append(*arguments)\n"
        "    time.sleep(0.5)\n"
        "work_file.WorkFiles.append = slowly\n"
        f"runpy.run_path({TOOL!r}, run_name='__main__')\n"
    )
    words = [sys.executable, str(slow), "--model", str(model), "--data", str(tokens), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = tmp_path / "killed" / "unfinished" / "worker-0.jsonl"
    while not (record.exists() and record.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    measured = record.read_text()
    # A block that never reached the disk, and a line that was cut off.
    record.write_bytes(b"\0\xff\n" + measured.encode() + measured[: len(measured) // 7].encode())

    run: list[str] = []
    plain = plan.share_of
    monkeypatch.setattr(
        "sparsecod_mcore.scoring.engine.share_of",
        lambda units, *rest: run.extend(unit.name for unit in units) or plain(units, *rest),
    )
    score(model, tokens, tmp_path / "killed")
    left = len(run)
    score(model, tokens, tmp_path / "whole")
    assert len(run) - left - left == measured.count("\n") >= 3
    for name in ("scores.json", "scores.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed" / "unfinished").exists()


def test_a_second_run_is_refused(random_model: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokens = random_model
    with alone_in(tmp_path / "out" / "unfinished"), pytest.raises(UserError, match="another run is at work in"):
        score(model, tokens, tmp_path / "out", "skip")
    assert score(model, tokens, tmp_path / "out", "skip").skip is not None
    assert not (tmp_path / "out" / "unfinished").exists()


def test_chunks_and_batches_make_no_difference(
    random_model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences at a time, one intervention at a time; eight and all at once; and within a memory budget."""
    model, tokens = random_model
    expected = score(model, tokens, tmp_path / "together")
    monkeypatch.setitem(plan.TOKENS_AT_ONCE, "cpu", 128)
    assert_same_figures(score(model, tokens, tmp_path / "apart"), expected, 2e-5)
    monkeypatch.undo()
    stack = load_stack(model)
    scores = make_scores(DEFAULT_SCORES, stack, Options())
    budget = sum(made.held_bytes() for made in scores) + plan.bytes_per_token(stack) * 64 * 5 // 2
    chosen = plan.make_plan(stack, scores, 8, 64, budget).chunks
    assert [chunk.end - chunk.begin for chunk in chosen] == [2, 2, 2, 2]
    assert_same_figures(score(model, tokens, tmp_path / "budget", budget=budget), expected, 2e-5)


def test_sampled_pairs(random_model: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokens = random_model
    every = score(model, tokens, tmp_path / "all", "permutation").permutation
    some = score(model, tokens, tmp_path / "some", "permutation", options=Options(sampled_pairs=6)).permutation
    assert every is not None and every.interval is None
    assert some is not None and some.interval is not None and some.interval.pairs == 6
    known = [(i, j) for i in range(5) for j in range(i + 1, 5) if not np.isnan(some.matrix[i][j])]
    assert len(known) == 6
    values = [some.matrix[i][j] for i, j in known]
    np.testing.assert_allclose(values, [every.matrix[i][j] for i, j in known], rtol=1e-5)
    # By hand: mean ± 1.96 · s / √6 · √(1 − 6/10).
    reach = 1.959964 * np.std(values, ddof=1) / 6**0.5 * 0.4**0.5
    assert some.score == pytest.approx(np.mean(values))
    assert (some.interval.low, some.interval.high) == pytest.approx((some.score - reach, some.score + reach))


def test_experts(tmp_path: Path) -> None:
    """Against routing and layers worked out by hand: the first layer is dense, the others have a shared expert."""
    save_random_checkpoint(MOE, tmp_path / "model")
    np.save(tmp_path / "tokens.npy", random_tokens(4, 33).numpy())
    scores = score(tmp_path / "model", tmp_path / "tokens.npy", tmp_path / "out", "moe")
    assert scores.moe is not None and list(scores.moe.layers) == ["1", "2"]
    stack = load_stack(tmp_path / "model")
    assert "moe" in names_for(stack)
    tokens_NT = random_tokens(4, 33)

    def without_experts(layer: int, hidden_SBD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer gives when its routed experts give nothing, and which experts its router selects."""
        module = stack.layers[layer]
        attended_SBD, _ = module._forward_attention(hidden_SBD, rotary_pos_emb=stack.model.rotary_pos_emb(32))
        x_SBD = module.pre_mlp_layernorm(attended_SBD)
        selected = (x_SBD @ module.mlp.router.weight.T).topk(2).indices
        return attended_SBD + module.mlp.shared_experts(x_SBD), selected

    for layer in (1, 2):
        found = scores.moe.layers[str(layer)]
        hidden_SBD = stack.embed(tokens_NT[:, :-1])
        for below in range(layer):
            hidden_SBD = stack.layer(below, hidden_SBD)
        usual_SBD = stack.layer(layer, hidden_SBD)
        hidden_SBD, selected = without_experts(layer, hidden_SBD)
        assert not torch.allclose(hidden_SBD, usual_SBD)
        for above in range(layer + 1, 3):
            hidden_SBD = stack.layer(above, hidden_SBD)
        loss = stack.losses(hidden_SBD, tokens_NT[:, 1:]).double().mean().item()
        frequency_E = np.bincount(selected.flatten(), minlength=4) / selected.numel()
        assert found.loss == pytest.approx(loss, rel=1e-6)
        assert found.relative_loss_increase == pytest.approx(loss / scores.loss - 1, rel=1e-4)
        np.testing.assert_allclose(found.selection_frequency, frequency_E, rtol=1e-12)
        assert found.balance == pytest.approx(1 - frequency_E.std() / frequency_E.mean())


def test_zeroed_experts_work_again(tmp_path: Path) -> None:
    save_random_checkpoint(MOE, tmp_path / "moe")
    stack = load_stack(tmp_path / "moe")
    hidden_SBD = stack.embed(random_tokens(2, 9))
    usual_SBD = stack.layer(1, hidden_SBD)
    ZeroExperts(1).enter(stack, hidden_SBD, 0)
    assert torch.equal(stack.layer(1, hidden_SBD), usual_SBD)


def test_similarity(random_model: tuple[Path, Path], tmp_path: Path) -> None:
    model, tokens = random_model
    similarity = score(model, tokens, tmp_path / "out", "similarity").similarity
    stack = load_stack(model)
    hidden_SBD = stack.embed(torch.from_numpy(np.load(tokens))[:, :-1])
    means = []
    for layer in range(stack.num_layers):
        hidden_SBD = stack.layer(layer, hidden_SBD)
        means.append(hidden_SBD.double().mean((0, 1)).numpy())
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in means] for b in means]
    assert similarity is not None
    np.testing.assert_allclose(similarity.matrix, expected, rtol=1e-5)


def test_rows_of_a_jacobian_are_outputs(tmp_path: Path) -> None:
    """Against reverse mode, through one layer, of the mean over tokens, by a shift of all tokens."""
    save_random_checkpoint(GQA, tmp_path / "model")
    np.save(tmp_path / "tokens.npy", random_tokens(3, 12).numpy())
    options = Options(jacobian_sequences=2)
    jacobian = score(
        tmp_path / "model", tmp_path / "tokens.npy", tmp_path / "out", "jacobian", options=options
    ).jacobian
    assert jacobian is not None and jacobian.sequences == 2
    stack = load_stack(tmp_path / "model")
    hidden_SBD = stack.layer(0, stack.embed(random_tokens(3, 12)[:2, :-1]))

    def mean_output(shift_D: torch.Tensor) -> torch.Tensor:
        output_SBD, _ = stack.layers[1](hidden_SBD + shift_D, None, rotary_pos_emb=stack.rotary_embedding(11))
        return output_SBD.mean((0, 1))

    expected_DD = torch.autograd.functional.jacobian(mean_output, torch.zeros(stack.hidden_size))
    assert (expected_DD - expected_DD.T).norm() > 0.5 * expected_DD.norm()
    matrix_DD = torch.tensor(jacobian.layers[1].matrix)
    assert (matrix_DD - expected_DD).norm() < 1e-5 * expected_DD.norm()


MEMORY = """
import resource, sys
from pathlib import Path
from sparsecod_mcore import platform; platform.prepare()
import torch
from sparsecod_mcore.scoring import engine, interventions, plan, registry, score, work_file
from tests.scoring.compare import assert_reproduced, assert_same_figures
from tests.scoring.random_models import GQA, random_stack
torch.set_num_threads(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shape = dict(num_layers=16, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8, kv_channels=64)
stack = random_stack(GQA | shape | dict(max_position_embeddings=512, vocab_size=4096, padded_vocab_size=4096), 0.03)
tokens = torch.randint(4096, (64, 513))
scores = registry.make_scores(registry.DEFAULT_SCORES, stack, score.Options())
working = engine.Engine(stack, tokens, plan.make_plan(stack, scores, 64, 512, None))
working.run_unchanged(scores)
groups = interventions.by_first(item for made in scores for item in made.interventions())
working.run_unit(plan.Unit(working.plan.chunks[0], 0), groups[0])  # the one with the most interventions
taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(taken, sum(parameter.numel() for parameter in stack.model.parameters()) * 4)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_within_hidden_states_and_weights() -> None:
    """16 layers, width 512, 64 x 512 tokens: the run of the model as it is, and the unit that takes most."""
    words = [sys.executable, "-c", MEMORY]
    done = subprocess.run(words, env=environment() | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    taken, weights = map(int, done.stdout.split()[-2:])
    hidden_states = 17 * 64 * 512 * 512 * 4
    assert taken < hidden_states + 1.5 * weights, (taken, hidden_states, weights)
