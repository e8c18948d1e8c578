"""Sweeps: what a file says, running and restarting, Slurm's script, and the table of results."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from sparsecod_mcore import platform

platform.prepare()

from sparsecod_mcore.errors import UserError  # noqa: E402
from sparsecod_mcore.experiments import sweep as sweeping  # noqa: E402
from sparsecod_mcore.experiments.collect import best_rates, collect, summary  # noqa: E402
from sparsecod_mcore.experiments.launch import scoring_command, training_command  # noqa: E402
from sparsecod_mcore.experiments.slurm import submit  # noqa: E402
from sparsecod_mcore.experiments.sweep import is_complete, run_tasks, select  # noqa: E402
from sparsecod_mcore.experiments.sweep_file import Sweep, Task, read_sweep, tasks_of  # noqa: E402
from tests.conftest import REPOSITORY  # noqa: E402

PRETEND = Path(__file__).parent / "pretend_training.py"
SWEEP = """
out: {out}
data: data/text
tokenizer: tokenizer.json
configs: {configs}/*.yaml
grid: {{lr: [1e-2, 0.02, 0.05], cod: {{stats_interval: [5]}}}}
seeds: [1, 2]
set: {{train_iters: 10}}
score: false
at_once: 2
slurm: {{nodes: 2, gpus_per_node: 4, at_once: 3, setup: module load cuda, options: {{partition: big}}}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, layers in (("deep", 8), ("flat", 2)):
        (configs / f"{name}.yaml").write_text(f"num_layers: {layers}\nseq_length: 64\nlr: 1.0\n")
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP.format(out=tmp_path / "out", configs=configs))
    return file


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in a blink; the real command's configuration is what the stand-in reads."""

    def command(sweep: Sweep, task: Task, **_: object) -> list[str]:
        real = training_command(sweep, task)
        return [sys.executable, str(PRETEND), real[real.index("--config") + 1], str(sweep.out / task.name)]

    monkeypatch.setattr(sweeping, "training_command", command)


def calls(sweep: Sweep, task: Task) -> int:
    return len((sweep.out / task.name / "calls").read_text())


def test_a_file_is_configs_times_grid_times_seeds(path: Path) -> None:
    sweep = read_sweep(path)
    tasks = tasks_of(sweep)
    assert len(tasks) == 2 * 3 * 2 and len({task.name for task in tasks}) == 12
    assert tasks[1].name == "deep-lr=0.01-stats_interval=5-seed=2"
    assert tasks[1].settings == {
        "num_layers": 8, "seq_length": 64, "lr": 0.01, "train_iters": 10, "cod.stats_interval": 5, "seed": 2,
    }  # fmt: skip


def test_commands_name_what_the_sweep_names(path: Path) -> None:
    sweep = read_sweep(path)
    task = tasks_of(sweep)[0]
    command = training_command(sweep, task)
    assert command[0] == sys.executable and command[1].endswith("examples/pretrain_cod.py")
    config = Path(command[command.index("--config") + 1])
    assert "stats_interval: 5" in config.read_text().split("cod:")[1]
    on_nodes = training_command(sweep, task, on_slurm=True)
    assert on_nodes[:5] == ["srun", "--nodes", "2", "--ntasks-per-node", "1"]
    assert on_nodes[on_nodes.index("--nproc-per-node") + 1] == "4"
    path.write_text(path.read_text().replace("score: false", "score: {sequences: 4}"))
    scoring = scoring_command(read_sweep(path), task)
    assert scoring[scoring.index("--sequences") + 1] == "4" and scoring[scoring.index("--length") + 1] == "64"


@pytest.mark.usefixtures("pretend")
def test_runs_are_run_once_and_the_best_rate_is_found(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = read_sweep(path)
    tasks = tasks_of(sweep)
    assert run_tasks(sweep, tasks[:4]) == []
    assert run_tasks(sweep, tasks) == []
    assert "4 of 12 runs are complete already" in capsys.readouterr().out
    assert {calls(sweep, task) for task in tasks} == {1}
    table = collect(sweep, tasks)
    assert pq.read_table(sweep.out / "results.parquet").equals(table) and summary(table) == "12 runs: 12 complete"
    rows = table.to_pylist()
    assert all(row["best_lr"] == (row["lr"] == 0.02) for row in rows)
    assert rows[0]["last_layer_variance"] == 3.0 and rows[0]["causal"] is None
    assert best_rates(table).splitlines() == [
        f"best learning rate of {name} cod.stats_interval=5: 0.02" for name in ("deep", "flat")
    ]


@pytest.mark.usefixtures("pretend")
def test_a_failed_run_is_told_of_and_tried_again(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text().replace("0.05]", "5.0]"))
    sweep = read_sweep(path)
    tasks = tasks_of(sweep)[:6]
    failed = run_tasks(sweep, tasks)
    assert {task.settings["lr"] for task in failed} == {5.0} and len(failed) == 2
    assert "failed: loss or gradients are not finite at iteration 3" in capsys.readouterr().out
    rows = collect(sweep, tasks).to_pylist()
    assert [row["state"] for row in rows] == ["complete"] * 4 + ["failed"] * 2
    assert [row["best_lr"] for row in rows] == [False, False, True, True, False, False]
    assert len(run_tasks(sweep, tasks)) == 2
    assert [calls(sweep, task) for task in tasks] == [1, 1, 1, 1, 2, 2]


@pytest.mark.usefixtures("pretend")
def test_a_refused_configuration_ends_the_sweep(path: Path) -> None:
    path.write_text(path.read_text().replace("[1, 2]", "[13, 1]").replace("at_once: 2", "at_once: 1"))
    sweep = read_sweep(path)
    tasks = tasks_of(sweep)
    with pytest.raises(UserError, match=r"^deep-lr=0.01-stats_interval=5-seed=13 is refused: seed 13 is refused$"):
        run_tasks(sweep, tasks)
    assert not (sweep.out / tasks[-1].name).exists()


@pytest.mark.usefixtures("pretend")
def test_another_configuration_under_the_same_name_is_not_complete(path: Path) -> None:
    sweep = read_sweep(path)
    task = tasks_of(sweep)[0]
    run_tasks(sweep, [task])
    path.write_text(path.read_text().replace("train_iters: 10", "train_iters: 20"))
    longer = read_sweep(path)
    assert is_complete(sweep, task) and not is_complete(longer, tasks_of(longer)[0])


@pytest.mark.usefixtures("pretend")
def test_slurm_gets_an_array_of_what_is_left(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = read_sweep(path)
    tasks = tasks_of(sweep)
    run_tasks(sweep, tasks[1:3])
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text('#!/bin/sh\ncp "$1" ' + str(tmp_path / "submitted") + '\necho "Submitted 7"\n')
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    submit(path, sweep, tasks)
    assert "Submitted 7" in capsys.readouterr().out
    script = (tmp_path / "submitted").read_text()
    for line in ("#SBATCH --array=0,3,4,5,6,7,8,9,10,11%3", "#SBATCH --nodes=2", "#SBATCH --partition=big"):
        assert f"{line}\n" in script
    assert "module load cuda\n" in script and script.rstrip().endswith('--task "$SLURM_ARRAY_TASK_ID"')
    assert subprocess.run(["bash", "-n", tmp_path / "submitted"]).returncode == 0
    (tools / "sbatch").write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
    with pytest.raises(UserError, match="no such partition"):
        submit(path, sweep, tasks)
    (tools / "sbatch").unlink()
    submit(path, sweep, tasks)
    assert "no sbatch here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("was", "given", "sentence"),
    [
        ("seeds:", "seed:", "'seed' is no key of the file (did you mean 'seeds'?)"),
        ("gpus_per_node", "gpus_a_node", "'gpus_a_node' is no key of slurm (did you mean 'gpus_per_node'?)"),
        ("tokenizer: tokenizer.json\n", "", "lacks tokenizer"),
        ("/*.yaml", "/*.yml", "configs: no file matches"),
        ("[1e-2, 0.02, 0.05]", "0.01", "grid: lr must be a list of values"),
        ("at_once: 2\n", "at_once: 0\n", "at_once must be 1 or more"),
        ("set: {train_iters: 10}", "set: 5", "set must be a mapping"),
        ("score: false", "score: {sequence: 4}", "'sequence' is no key of score (did you mean 'sequences'?)"),
    ],
)
def test_mistakes_in_a_file_are_named(path: Path, was: str, given: str, sentence: str) -> None:
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, given, 1))
    with pytest.raises(UserError) as refused:
        read_sweep(path)
    assert sentence in str(refused.value)


def test_a_task_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="--task 12 is given, 0 to 11 is accepted"):
        select(tasks_of(read_sweep(path)), 12)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "examples" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_sweeps_name_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    tasks = tasks_of(read_sweep(path))
    assert len(tasks) > 3 and all("num_layers" in task.settings for task in tasks)


def test_configurations_come_in_the_order_of_their_numbers(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    for layers, name in enumerate(("depth_16", "depth_4", "decay_0.1", "decay_0.01", "decay_0"), 1):
        (tmp_path / f"{name}.yaml").write_text(f"num_layers: {layers}\n")
    path.write_text(yaml.safe_dump(content | {"configs": [str(tmp_path / "d*_*.yaml")], "grid": {}, "seeds": []}))
    names = [task.name for task in tasks_of(read_sweep(path))]
    assert names == ["decay_0", "decay_0.01", "decay_0.1", "depth_4", "depth_16"]
