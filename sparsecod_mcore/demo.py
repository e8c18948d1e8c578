"""The demo: from text to two trained models, scored and compared in a report, on any machine without data."""

import json
import os
from pathlib import Path

import yaml

from sparsecod_mcore import platform
from sparsecod_mcore.data import Corpus, DocstringCorpus, FileCorpus, unigram_perplexity
from sparsecod_mcore.data.prepare import fingerprint, prepare
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
    folder = Path("runs") / f"demo-{fingerprint(corpus, tokenizer)}"
    data, tokenizer = prepare(corpus, folder / "data", tokenizer, VOCABULARY_SIZE)
    unigram = unigram_perplexity(f"{data}_valid")
    print("\ntraining both models")
    run_side_by_side({name: _training(folder / name, config, data, tokenizer) for name, config in MODELS.items()})
    for name in MODELS:
        _show(folder / name, unigram)
    print("\nscoring both models")
    _score(folder, data)
    print(f"\ncurves: .venv/bin/tensorboard --logdir {folder}")
    make_report([folder / name for name in MODELS], folder / "report.html")


def _training(run: Path, config: Path, data: Path, tokenizer: Path) -> list[str]:
    command = ["python", "-m", "torch.distributed.run", "--standalone", "examples/pretrain_cod.py"]
    command += ["--config", str(config), "--cod-data", str(data), "--cod-tokenizer", str(tokenizer)]
    return [*command, "--cod-run-dir", str(run), "--full-validation"]


def _score(folder: Path, data: Path) -> None:
    """Score the models that have no scores, or those of earlier weights; show those of others."""
    commands = {}
    for name, config in MODELS.items():
        scores = folder / name / "scores" / "scores.json"
        if _are_of_present_weights(scores, folder / name):
            print(f"\n{name}:\n{summary(read_scores(scores))}")
        else:
            commands[name] = _scoring(folder / name, config, data)
    run_side_by_side(commands)


def _scoring(run: Path, config: Path, data: Path) -> list[str]:
    """A few held-out sequences, of as many tokens for every model: enough to tell layers apart."""
    settings = yaml.safe_load(config.read_text())
    arguments = ["--model", str(run), "--data", str(data), "--out", str(run / "scores")]
    arguments += ["--length", str(settings["seq_length"]), "--sequences", str(SCORED_TOKENS // settings["seq_length"])]
    if "num_experts" in settings:
        platform.prepare()
        from sparsecod_mcore.scoring.registry import SCORES  # imports Megatron, which nothing else here waits for

        arguments += ["--scores", ",".join(SCORES)]
    return ["python", "tools/score_layers.py", *arguments]


def _are_of_present_weights(scores: Path, run: Path) -> bool:
    """Whether there are scores, and of the checkpoint that the run has now: it may have been trained on since."""
    if not scores.exists():
        return False
    platform.prepare()
    from sparsecod_mcore.scoring.stack import model_files  # imports Megatron, which nothing else here waits for

    return read_scores(scores).provenance.model_sha256 == hash_files(model_files(run))


def _show(run: Path, unigram: float) -> None:
    figures = save_variance_figure(run, run / "variance")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    perplexity = [record["validation_perplexity"] for record in records if "validation_perplexity" in record][-1]
    print(f"\n{run.name}\n\n{variance_table(run)}\n\n{jacobian_table(run)}\n")
    print(
        f"{run.name}: validation perplexity {perplexity:.1f}; unigram perplexity of the same tokens {unigram:.1f}, "
        f"{unigram / perplexity:.1f} times as high"
    )
    print(f"figure: {', '.join(map(str, figures))}")
