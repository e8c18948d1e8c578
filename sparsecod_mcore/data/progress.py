"""Progress of work on documents."""

from sparsecod_mcore.progress import ProgressLine


class Progress(ProgressLine):
    """Tells documents, documents/s and MB/s of text."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self._documents = 0
        self._text_bytes = 0

    def advance(self, documents: int, text_bytes: int, share: float | None) -> None:
        """Count `documents` of together `text_bytes` bytes; `share` of the corpus is done now."""
        self._documents += documents
        self._text_bytes += text_bytes
        self.show(share)

    def amounts(self, seconds: float) -> str:
        return (
            f"{self._documents:,} documents, {self._text_bytes / 1e6:,.1f} MB, "
            f"{self._documents / seconds:,.1f} documents/s, {self._text_bytes / 1e6 / seconds:,.2f} MB/s"
        )
