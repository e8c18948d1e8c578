"""A run that was killed goes on where it stopped and ends in the same bytes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sparsecod_mcore.data import FileCorpus, parts, preprocess

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("small_parts.py")
PART_BYTES = 50_000
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def long_corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 3 MB of text: seconds of work, in about 50 parts."""
    path = tmp_path_factory.mktemp("long") / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(6_000):
            file.write(json.dumps({"text": f"{number}: {texts[number % len(texts)]}"}) + "\n")
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def start(corpus: Path, prefix: Path, tokenizer: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(corpus), str(prefix), str(tokenizer)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def data_of(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}[._]*")}


def test_killed_twice_and_run_again(
    long_corpus: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed, whole = tmp_path / "killed" / "data", tmp_path / "whole" / "data"
    made: set[Path] = set()
    for at_least in (3, 10):
        process = start(long_corpus, killed, tokenizer_path)
        wait_until(lambda more=at_least: len(list(killed.parent.glob("data.parts/*.npz"))) >= more)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(workers) >= 2
        _, left = psutil.wait_procs(workers, timeout=10)
        for worker in left:
            worker.kill()
        assert not left, "the workers are to end with their parent"
        process.communicate()
        now = set(killed.parent.glob("data.parts/*.npz"))
        assert made < now, "the second run is to keep the parts of the first"
        made = now
        assert not list(killed.parent.glob("data_*.bin")) and not killed.with_suffix(".json").exists()

    monkeypatch.setattr(parts, "PART_BYTES", PART_BYTES)
    corpus = FileCorpus([str(long_corpus)])
    preprocess(corpus, killed, tokenizer_path, workers=1)
    output = capsys.readouterr().out
    assert "going on with the unfinished work" in output
    tokenized = int(re.findall(r"([\d,]+) documents,", output)[-1].replace(",", ""))
    assert 0 < tokenized < 6_000

    preprocess(corpus, whole, tokenizer_path, workers=2)
    assert data_of(killed) == data_of(whole)
    assert len(data_of(whole)) == 5


def test_an_interrupt_ends_with_one_line(long_corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "longer.jsonl"  # so long that a busy machine does not miss the moment
    corpus.write_bytes(long_corpus.read_bytes() * 20)
    tool = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), str(corpus)]
    process = subprocess.Popen(
        [*tool, "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "data"), "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the tool and all its processes
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert errors == "interrupted; the same command goes on from here\n"
