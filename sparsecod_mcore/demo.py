"""The demo: from text to two trained models, scored and compared in a report, on any machine without data."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from sparsecod_mcore import platform
from sparsecod_mcore.data import Corpus, DocstringCorpus, FileCorpus, unigram_perplexity
from sparsecod_mcore.data.prepare import fingerprint, prepare
from sparsecod_mcore.errors import UserError
from sparsecod_mcore.report.figures import save_variance_figure
from sparsecod_mcore.report.page.command import make_report
from sparsecod_mcore.report.tables import jacobian_table, variance_table
from sparsecod_mcore.scoring.provenance import hash_files
from sparsecod_mcore.scoring.results import read_scores
from sparsecod_mcore.scoring.summary import summary
from sparsecod_mcore.side_by_side import run_side_by_side

REPOSITORY = Path(__file__).parents[1]
MODELS = {
    "naive": Path("examples/configs/demo_naive.yaml"),
    "recipe": Path("examples/configs/demo_recipe.yaml"),
}
VOCABULARY_SIZE = 4096
SCORED_TOKENS = 2048


def run_demo(corpus_path: str | None, tokenizer: Path | None) -> None:
    """Train and score two deep models, a naive one and one with the recipe of the paper, and report on both.

    They are trained on docstrings, or on the text or JSONL at `corpus_path`. Without a `tokenizer` a BPE is trained on
    the corpus first. Everything goes to runs/demo-…, named after what it was made from; the same call goes on where it
    was interrupted, and does nothing twice.
    """
    corpus: Corpus = DocstringCorpus() if corpus_path is None else FileCorpus([os.path.abspath(corpus_path)])
    tokenizer = None if tokenizer is None else tokenizer.absolute()
    os.chdir(REPOSITORY)
    configs = [config.read_text() for config in MODELS.values()]
    folder = Path("runs") / f"demo-{fingerprint(corpus, tokenizer, *configs)}"
    data, tokenizer = prepare(corpus, folder / "data", tokenizer, VOCABULARY_SIZE)
    unigram = unigram_perplexity(f"{data}_valid")
    print("\ntraining and scoring both models")
    run_side_by_side({name: _work(folder / name, config, data, tokenizer) for name, config in MODELS.items()})
    for name in MODELS:
        _show(folder / name, unigram)
    print(f"\ncurves: .venv/bin/tensorboard --logdir {folder}")
    make_report([folder / name for name in MODELS], folder / "report.html")


def _work(run: Path, config: Path, data: Path, tokenizer: Path) -> Iterator[list[str]]:
    """Train a model, and score it if it has no scores, or those of earlier weights."""
    yield _training(run, config, data, tokenizer)
    if not _are_of_present_weights(run / "scores" / "scores.json", run):
        yield _scoring(run, config, data)


def _training(run: Path, config: Path, data: Path, tokenizer: Path) -> list[str]:
    command = ["python", "-m", "torch.distributed.run", "--standalone", "examples/pretrain_cod.py"]
    command += ["--config", str(config), "--cod-data", str(data), "--cod-tokenizer", str(tokenizer)]
    return [*command, "--cod-run-dir", str(run), "--full-validation"]


def _scoring(run: Path, config: Path, data: Path) -> list[str]:
    """A few held-out sequences, of as many tokens for every model: enough to tell layers apart."""
    length = yaml.safe_load(config.read_text())["seq_length"]
    command = [
        "python",
        "tools/score_layers.py",
        "--model",
        str(run),
        "--data",
        str(data),
        "--out",
        str(run / "scores"),
    ]
    return [*command, "--length", str(length), "--sequences", str(SCORED_TOKENS // length)]


def _are_of_present_weights(scores: Path, run: Path) -> bool:
    """Whether there are scores that can be read, and of the checkpoint that the run has now, not of an earlier one."""
    if not scores.exists():
        return False
    platform.prepare()
    from sparsecod_mcore.scoring.stack import model_files  # imports Megatron, which nothing else here waits for

    try:
        return read_scores(scores).provenance.model_sha256 == hash_files(model_files(run))
    except UserError:
        return False


def _show(run: Path, unigram: float) -> None:
    figures = save_variance_figure(run, run / "variance")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    perplexity = [record["validation_perplexity"] for record in records if "validation_perplexity" in record][-1]
    print(f"\n{run.name}\n\n{variance_table(run)}\n\n{jacobian_table(run)}\n")
    print(f"{summary(read_scores(run / 'scores' / 'scores.json'))}\n")
    print(
        f"{run.name}: validation perplexity {perplexity:.1f}; unigram perplexity of the same tokens {unigram:.1f}, "
        f"{unigram / perplexity:.1f} times as high"
    )
    print(f"figure: {', '.join(map(str, figures))}")
