"""The configurations under examples/configs that are written from tables of runs, and checked in."""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from sparsecod_mcore.data.atomic import make_folder, write_atomically
from sparsecod_mcore.experiments.amounts import in_words
from sparsecod_mcore.experiments.paper import PAPER_RUNS
from sparsecod_mcore.experiments.questions import runs_of
from sparsecod_mcore.experiments.runs import Run, settings_of
from sparsecod_mcore.experiments.sizes import SIZES
from sparsecod_mcore.train.run_directory import nest

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
_WRITER = "tools/write_configs.py writes this file from a table in sparsecod_mcore/experiments/{table}.py."


def file_text(run: Run, table: str) -> str:
    """The configuration file of a run, in the order in which a reader wants to know."""
    recipe = run.recipe
    tokens = recipe.steps * recipe.tokens_per_step
    head = f"{run.says} {in_words(tokens)} tokens in {recipe.steps} steps. {_WRITER.format(table=table)}"
    comment = "\n".join(f"# {line}" for line in textwrap.wrap(head, 110))
    return f"{comment}\n{yaml.safe_dump(nest(settings_of(run)), sort_keys=False)}"


def all_files() -> Iterator[tuple[Path, str]]:
    """Every file that is written from a table, and its content."""
    yield from _files("paper", "paper", PAPER_RUNS)
    for size in SIZES.values():
        yield from _files(size.name, "sizes", runs_of(size))


def _files(folder: str, table: str, runs: Iterable[Run]) -> Iterator[tuple[Path, str]]:
    return ((CONFIGS / folder / f"{run.name}.yaml", file_text(run, table)) for run in runs)


def write_configs() -> int:
    """Write all files, remove those that no table has any more; return how many there are."""
    contents = dict(all_files())
    for folder in {path.parent for path in contents}:
        make_folder(folder)
        for path in set(folder.glob("*.yaml")) - contents.keys():
            path.unlink()
    for path, text in contents.items():
        write_atomically(path, text.encode())
    return len(contents)
