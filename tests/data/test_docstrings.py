"""The corpus of docstrings."""

from itertools import islice

from sparsecod_mcore.data import DocstringCorpus
from sparsecod_mcore.data.docstrings import docstrings_of
from sparsecod_mcore.data.documents import text_of

SOURCE = b'''
"""Tools for measuring how the variance of the residual stream grows over the depth of a network."""

class Meter:
    """A meter that is attached to a layer and counts what passes through it during training.

    It is indented here, and not there.

    >>> Meter().count
    0

    After the example the text goes on, as it does in many libraries.
    """

    def count(self):
        """Too short."""

    def table(self):
        """
        +------+------+------+------+------+------+------+------+
        | 0.12 | 0.34 | 0.56 | 0.78 | 0.90 | 0.12 | 0.34 | 0.56 |
        +------+------+------+------+------+------+------+------+
        """

    async def listen(self):
        """Wait for the next forward pass of the layer, and return the statistics that it left behind."""
'''


def test_prose_of_modules_classes_and_functions() -> None:
    assert docstrings_of(SOURCE) == [
        "Tools for measuring how the variance of the residual stream grows over the depth of a network.",
        "A meter that is attached to a layer and counts what passes through it during training.\n\n"
        "It is indented here, and not there.\n\n"
        "After the example the text goes on, as it does in many libraries.",
        "Wait for the next forward pass of the layer, and return the statistics that it left behind.",
    ]


def test_what_does_not_parse_has_no_docstrings() -> None:
    assert docstrings_of(b'"""A docstring"""\ndef broken(:\n') == []
    assert docstrings_of(b'"""A null byte\0"""\n') == []
    assert docstrings_of(b'# coding: nonsense\n"""Text"""\n') == []


def test_documents_are_deterministic_and_distinct_for_any_number_of_workers() -> None:
    first = list(islice(DocstringCorpus(workers=1).records(), 60))
    assert list(islice(DocstringCorpus(workers=2).records(), 60)) == first
    paragraphs = [text_of(record) for record in first]
    assert len(set(paragraphs)) == 60
    assert sum(map(len, paragraphs)) > 60 * 500
    packages = {record.source.split("site-packages/")[-1].split("/")[0] for record in first}
    assert len(packages) > 10, "the first documents are to come from all over"


def test_identity_tells_environments_apart() -> None:
    [identity] = DocstringCorpus().identity()
    assert identity["name"] == "docstrings"
    assert len(str(identity["distributions_sha256"])) == 64
