"""The HTML report taken apart, by a parser that minds what is left open."""

import base64
import csv
import io
import json
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "img", "br", "path"}


class Page(HTMLParser):
    """Elements of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open and self._open[-1] == "script" else self.text).append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """Attributes of the elements with these attributes; class_ is one of several."""
        return [
            found
            for name, found in self.tags
            if name == tag
            and all(
                value in found.get("class", "").split() if key == "class_" else found.get(key) == value
                for key, value in wanted.items()
            )
        ]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def data(self, figure: str) -> list[dict[str, str]]:
        """Rows of the CSV that a figure links."""
        [link] = self.all("a", download=f"{figure}.csv")
        text = base64.b64decode(link["href"].partition("base64,")[2]).decode()
        return list(csv.DictReader(io.StringIO(text)))

    def hovers(self) -> list[dict[str, Any]]:
        """What each plot says under the pointer."""
        return [json.loads(script) for script in self.scripts if script.startswith("{")]
