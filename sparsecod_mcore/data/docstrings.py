"""English text that every machine has: the docstrings of the standard library and the installed packages."""

import ast
import doctest
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from platform import python_version

from sparsecod_mcore.data.documents import Record
from sparsecod_mcore.data.parallel import available_cores, ordered_map

ENOUGH_CHARACTERS = 16_000_000  # reading on would take longer than a small model can make use of
_SHORTEST = 80  # characters; one-liners such as "Return the name." teach a language model little
_LEAST_PROSE = 0.78  # share of letters and blanks; below it stand tables, signatures and diagrams
_SKIPPED_FOLDERS = re.compile(r"tests?|testing|_vendor|vendored|site-packages|dist-packages|__pycache__")
_MODULES_PER_TASK = 16

_examples = doctest.DocTestParser()


class DocstringCorpus:
    """The docstrings of modules, one document each, until `ENOUGH_CHARACTERS` are found.

    Modules come in a fixed order that mixes the packages, so that any number of first documents is a fair
    sample. A docstring that occurs again is left out, as are doctest examples, what is hardly prose, test
    suites, vendored copies, and modules that cannot be read or parsed. A module without any docstring left
    is no document.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or available_cores()

    def identity(self) -> list[dict[str, object]]:
        """What the text depends on: the Python version and every installed distribution's version."""
        installed = sorted({f"{found.name} {found.version}" for found in distributions()})
        digest = hashlib.sha256("\n".join(installed).encode()).hexdigest()
        return [{"name": "docstrings", "python": python_version(), "distributions_sha256": digest}]

    def records(self) -> Iterator[Record]:
        """Yield one record per module."""
        modules = _modules()
        tasks = [modules[start : start + _MODULES_PER_TASK] for start in range(0, len(modules), _MODULES_PER_TASK)]
        seen: set[str] = set()
        characters = 0
        for done, task in enumerate(ordered_map(_docstrings_of_modules, tasks, self.workers), start=1):
            for module, docstrings in task:
                new = [text for text in dict.fromkeys(docstrings) if text not in seen]
                if new:
                    seen.update(new)
                    characters += sum(map(len, new))
                    fraction = max(done / len(tasks), min(characters / ENOUGH_CHARACTERS, 1.0))
                    yield Record(module, 0, "\n\n".join(new), None, fraction)
                if characters >= ENOUGH_CHARACTERS:
                    return


def docstrings_of(source: bytes) -> list[str]:
    """Prose of the docstrings of a module's source code, in source order; empty where it cannot be parsed."""
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    prose = (_prose(text) for text in _docstrings(module))
    return [text for text in prose if text]


def _modules() -> list[Path]:
    paths = sysconfig.get_paths()
    found: dict[Path, Path] = {}
    for root in dict.fromkeys(Path(paths[kind]) for kind in ("stdlib", "purelib", "platlib")):
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not any(_SKIPPED_FOLDERS.fullmatch(part) for part in inside.parts[:-1]):
                found[path] = inside
    # Ordered by a hash of the path inside its root: mixed, and the same wherever Python is installed.
    return sorted(found, key=lambda path: hashlib.sha256(found[path].as_posix().encode()).digest())


def _docstrings_of_modules(modules: list[Path]) -> list[tuple[str, list[str]]]:
    found = []
    for path in modules:
        try:
            source = path.read_bytes()
        except OSError:
            continue
        found.append((str(path), docstrings_of(source)))
    return found


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _prose(docstring: str) -> str:
    """The docstring without its doctest examples, or an empty string if too little of it is prose."""
    try:
        parts = _examples.parse(docstring)
    except ValueError:  # an example with a broken prompt
        return ""
    text = "".join(part for part in parts if isinstance(part, str))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    if len(text) < _SHORTEST:
        return ""
    letters_and_blanks = sum(map(len, re.findall(r"[A-Za-z\s]+", text)))
    return text if letters_and_blanks >= _LEAST_PROSE * len(text) else ""
