"""The tools as a user calls them."""

import gzip
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecod_mcore.data import check_dataset, check_vocabulary, load_tokenizer

REPOSITORY = Path(__file__).parents[2]


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_tokenizer_is_trained_and_used(corpus_path: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "made" / "here" / "tokenizer.json"
    trained = run_tool("train_tokenizer.py", corpus_path, "--vocab-size", "350", "--output", tokenizer)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert load_tokenizer(tokenizer).vocabulary_size == 350
    prefix = tmp_path / "out" / "data"
    command = (corpus_path, "--tokenizer", tokenizer, "--output", prefix, "--limit-documents", "40")
    done = run_tool("preprocess_data.py", *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert check_dataset(f"{prefix}_train").documents + check_dataset(f"{prefix}_valid").documents == 40
    check_vocabulary(f"{prefix}_train", tokenizer)
    again = run_tool("preprocess_data.py", *command)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{prefix}: already complete\n", "")


def test_an_error_in_a_worker_is_one_sentence(tokenizer_path: Path, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "good"}) + "\n" + "{bad\n")
    done = run_tool(
        "preprocess_data.py",
        *(
            tmp_path / "a.jsonl.gz",
            "--tokenizer",
            tokenizer_path,
            "--output",
            tmp_path / "o",
            "--workers",
            "2",
        ),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/a.jsonl.gz line 2 is not valid JSON")


MISTAKES = {
    "": "the following arguments are required: --tokenizer, --output",
    "{corpus} --tokenizer {tokenizer}": "required: --output",
    "--tokenizer {tokenizer} --output o": "a corpus is one of: input files, --docstrings, --hf-dataset NAME",
    "{corpus} --docstrings --tokenizer {tokenizer} --output o": "a corpus is one of",
    "{corpus} --hf-config x --tokenizer {tokenizer} --output o": "--hf-config needs --hf-dataset",
    "{corpus} --tokenizer {tokenizer} --output o --wrokers 2": "unrecognized arguments: --wrokers 2",
    "{corpus} --tokenizer {tokenizer} --output o --workers 0": "0 workers were asked for",
    "{corpus} --tokenizer {tokenizer} --output o --workers two": "invalid int value: 'two'",
    "{corpus} --tokenizer {tokenizer} --output o --valid-fraction 1": "held-out fraction is 1.0",
    "{corpus} --tokenizer {tokenizer} --output o --valid-fraction -0.1": "held-out fraction is -0.1",
    "{corpus} --tokenizer {tokenizer} --output o --valid-fraction nan": "held-out fraction is nan",
    "{corpus} --tokenizer {tokenizer} --output o --valid-input absent.txt": "absent.txt does not exist",
    "{corpus} --tokenizer {tokenizer} --output o --eos-token <end>": "has no token '<end>'",
    "{corpus} --tokenizer {tokenizer} --output o --limit-documents 0": "the limit is 0 documents",
    "{corpus} --tokenizer {tokenizer} --output {corpus}/o": "corpus.jsonl is a file",
    "{corpus} --tokenizer {tokenizer} --output o --text-key body": "line 1 has no key 'body'",
    "{corpus} --tokenizer {corpus} --output o": "is not valid JSON",
    "{corpus} --tokenizer absent.json --output o": "absent.json cannot be read",
    "absent-*.jsonl --tokenizer {tokenizer} --output o": "no file matches absent-*.jsonl",
    "--hf-dataset absent/folder/ --tokenizer {tokenizer} --output o": "absent/folder/ cannot be opened",
    "{corpus} --tokenizer {tokenizer} --output {indexed}": "was made from something else",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    arguments: str,
    corpus_path: Path,
    tokenizer_path: Path,
    indexed_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = arguments.format(corpus=corpus_path, tokenizer=tokenizer_path, indexed=indexed_prefix).split()
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *filled])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(REPOSITORY / "tools" / "preprocess_data.py"), run_name="__main__")
    assert left.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert MISTAKES[arguments] in errors


def test_mistakes_of_training_a_tokenizer(corpus_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, reason in [
        ((corpus_path, "--vocab-size", "100", "--output", tmp_path / "t.json"), "100 tokens is too small"),
        ((corpus_path, "--output", tmp_path / "file" / "t.json"), "cannot be made"),
        (("--output", tmp_path / "t.json"), "a corpus is one of"),
    ]:
        done = run_tool("train_tokenizer.py", *arguments)
        assert done.returncode == 2
        assert reason in done.stderr and done.stderr.count("\n") == 1
