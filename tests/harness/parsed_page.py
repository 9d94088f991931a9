"""A page of HTML as a parser sees it: Python's own, so that nothing here depends on how the page was made."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "input", "br", "img", "col"}


class ParsedPage(HTMLParser):
    """All elements and texts of a page.

    Attributes:
        elements: tag and attributes, in order.
        texts: ``(tags around, text)``, in order.
        scripts: contents of script elements, by type.
        rows: the texts of the cells of every row of every table.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.scripts: dict[str, list[str]] = {}
        self.styles: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> without a beginning"
        assert self._open[-1][0] == tag, f"</{tag}> inside of <{self._open[-1][0]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        tags = tuple(tag for tag, _ in self._open)
        if tags and tags[-1] == "script":
            self.scripts.setdefault(self._open[-1][1].get("type") or "", []).append(data)
        elif tags and tags[-1] == "style":
            self.styles.append(data)
        else:
            self.texts.append((tags, data))
            if {"td", "th"} & set(tags):
                self.rows[-1][-1] += data

    @property
    def data(self) -> Any:
        """What the script draws."""
        (text,) = self.scripts["application/json"]
        return json.loads(text)

    @property
    def text(self) -> str:
        """What a person reads, before any script runs."""
        return " ".join(" ".join(data for _, data in self.texts).split())

    def attributes(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value or "" for _, attributes in self.elements for key, value in attributes.items() if key == name]
