"""Dockerfiles, batch scripts and manifests: linted, and run as far as that goes without a cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("Dockerfile*"))
BATCH_SCRIPTS = sorted((REPOSITORY / "examples" / "slurm").glob("*.sbatch"))
SCRIPTS = [*BATCH_SCRIPTS, REPOSITORY / "examples" / "slurm" / "train.sh", REPOSITORY / "tools" / "bootstrap.sh"]
MANIFESTS = sorted((REPOSITORY / "examples" / "k8s").glob("*.yaml"))
BIN = Path(sys.executable).parent  # linters are installed beside the interpreter

# A srun that runs one task of the step, and one that trains until it is told to save.
ONE_TASK = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_STEP_ID=0 SLURM_PROCID=9 SLURM_LOCALID=1 exec "$1" "$2" "$3" --dry-run "${@:4}"
"""
TRAINS_UNTIL_TOLD = """#!/usr/bin/env bash
trap 'echo saving; sleep 0.5; echo saved; exit SAVED' TERM
echo training
while :; do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*"
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY, timeout=60)


def test_linters_find_nothing() -> None:
    for command in ([BIN / "hadolint", *DOCKERFILES], [BIN / "shellcheck", "-x", *SCRIPTS]):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    for script in SCRIPTS:
        assert run("bash", "-n", script).returncode == 0


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_unprivileged_and_keep_no_secrets(path: Path) -> None:
    lines = re.sub(r"\\\n", " ", path.read_text()).splitlines()
    instructions = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    bases = [rest for word, rest in instructions if word == "FROM"]
    assert bases and all(re.search(r":\d+\.\d+[^:]*$", base.split(" AS ")[0]) for base in bases)
    words = [word for word, _ in instructions]
    users = [rest for word, rest in instructions if word == "USER"]
    assert users == ["1000:1000"] and "USER" not in words[: words.index("COPY")]
    assert "RUN" not in words[words.index("USER") :], "what is done after USER could have been done before"
    assert "HEALTHCHECK" in words and "ENTRYPOINT" in words
    assert not re.search(r"(?i)^(ARG|ENV).*(key|token|secret|password)", "\n".join(lines), re.MULTILINE)
    for word, rest in instructions:
        for source in rest.split()[:-1] if word == "COPY" and "--from" not in rest else []:
            assert (REPOSITORY / source).exists() and f"!{source}" in (REPOSITORY / ".dockerignore").read_text()
    assert (REPOSITORY / ".dockerignore").read_text().splitlines()[1] == "*", "what is not named stays outside"


def test_pinned_megatron_is_that_of_the_project() -> None:
    [pin] = re.findall(r"^megatron-core==\S+", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pin in (REPOSITORY / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    spec = manifest["spec"]
    replicas = spec.get("pytorchReplicaSpecs", {"one": spec})
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        [container] = pod["containers"]
        mounts, volumes = ({entry["name"] for entry in of} for of in (container["volumeMounts"], pod["volumes"]))
        assert mounts == volumes
        for word in (*container.get("args", ()), *container.get("command", ())):
            file = word.rpartition("=")[2]
            assert not file.endswith((".py", ".yaml")) or (REPOSITORY / file).exists()
        for variable in container.get("env", ()):
            assert "value" not in variable or "KEY" not in variable["name"]


def slurm(folder: Path, nodes: int, srun: str) -> dict[str, str]:
    """Variables of a batch step, with Slurm's commands faked in `folder`."""
    for name, content in (("srun", srun), ("scontrol", SCONTROL)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SPARSECOD_PYTHON": sys.executable,
        "SPARSECOD_PROCESSES_PER_NODE": "8",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(8 * nodes),
        "SLURM_JOB_NODELIST": f"gpu[01-{nodes:02d}]" if nodes > 1 else "gpu01",
    }


@pytest.mark.parametrize("path", BATCH_SCRIPTS, ids=lambda path: path.stem)
def test_batch_scripts_start_ranks(path: Path, tmp_path: Path) -> None:
    """The script's own flags reach a rank with its place; what #SBATCH asks for fits to them."""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", path.read_text(), re.MULTILINE))
    nodes = int(asked["nodes"])
    assert path.stem == f"pretrain_{nodes}_node{'s' if nodes > 1 else ''}"
    assert asked["signal"].startswith("B:TERM@") and "#SBATCH --requeue\n" in path.read_text()
    done = subprocess.run(
        ["bash", path, "--cod-data", "a b"],
        env=slurm(tmp_path, nodes, ONE_TASK), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)
    assert started["found"] == "Slurm"
    place = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": str(8 * nodes), "LOCAL_WORLD_SIZE": "8"}
    assert started["environment"] == place | {"MASTER_ADDR": "gpu01", "MASTER_PORT": "24711"}
    command = started["command"]
    assert command[:2] == [sys.executable, "examples/pretrain_cod.py"] and command[-2:] == ["--cod-data", "a b"]
    assert (REPOSITORY / command[command.index("--config") + 1]).exists()


@pytest.mark.parametrize(("saved", "requeued"), [(0, True), (1, False)])
def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(saved: int, requeued: bool, tmp_path: Path) -> None:
    env = slurm(tmp_path, 1, TRAINS_UNTIL_TOLD.replace("SAVED", str(saved)))
    job = subprocess.Popen(["bash", BATCH_SCRIPTS[0]], env=env, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "training\n"
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: has it
    said, _ = job.communicate(timeout=20)
    assert job.returncode == saved
    assert said.startswith("saving\nsaved\n") and ("scontrol requeue 4711" in said) == requeued
