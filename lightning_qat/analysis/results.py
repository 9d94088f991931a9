"""Base of all results: frozen rows without any formatting. ``reporting`` decides how they look."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Advice:
    """One problem, and what to do about it.

    Args:
        heading: the problem in a few words.
        level: severity: ``error``, ``warning`` or ``info``.
        text: the problem in a sentence.
        names: the ops, points or modules with this problem.
        facts: further facts, as pairs of label and text.
        yaml: configuration to paste.
    """

    heading: str
    level: str = ""
    text: str = ""
    names: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    yaml: str = ""


@dataclass(frozen=True)
class Block:
    """One part of a result, as a person reads it: a title, a note, advice and a table. Each may be missing.

    Args:
        title: a line above everything.
        columns: headings of the table.
        rows: cells of the table, in the order of the columns.
        note: what the table is about, or what follows from it.
        advice: what to do, the most important first.
    """

    title: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    note: str = ""
    advice: tuple[Advice, ...] = ()

    @classmethod
    def of(cls, title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], note: str = "") -> Block:
        """Build a block from some columns of rows that are dictionaries."""
        return cls(title, tuple(columns), tuple(tuple(row[column] for column in columns) for row in rows), note)

    def only(self, columns: Sequence[str]) -> Block:
        """Return the same block with some of its columns."""
        places = [self.columns.index(column) for column in columns]
        return replace(self, columns=tuple(columns), rows=tuple(tuple(row[i] for i in places) for row in self.rows))


@dataclass(frozen=True)
class Result(Generic[RowT]):
    """A table of frozen dataclass rows; the fields of the row class are the columns.

    Subclasses set ``title``, and ``shown``: the columns to show where there is little room (files hold all of them).
    """

    rows: tuple[RowT, ...]
    title: ClassVar[str] = ""
    shown: ClassVar[tuple[str, ...]] = ()

    @property
    def note(self) -> str:
        """Say in a sentence what the table is about, or what follows from it."""
        return ""

    @property
    def verdict(self) -> str:
        """The verdict: the one or two words at the start of the note; empty without a verdict."""
        return ""

    def columns(self) -> tuple[str, ...]:
        """Names of all columns; empty without rows."""
        return tuple(f.name for f in dataclasses.fields(self.rows[0])) if self.rows else ()  # type: ignore[arg-type]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of primitives."""
        return [dataclasses.asdict(row) for row in self.rows]  # type: ignore[call-overload]

    def about(self) -> dict[str, Any]:
        """Return the facts beside the rows, for the JSON file."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}

    def for_people(self) -> Result[RowT]:
        """Return the rows that tables for people show; csv and json hold all."""
        return self

    def blocks(self) -> tuple[Block, ...]:
        """Return the short form for the terminal and the loggers: the ``shown`` columns."""
        return (Block.of(self.title, self.shown or self.columns(), self.for_people().to_dicts(), self.note),)

    def full_blocks(self) -> tuple[Block, ...]:
        """Return the full form for a text file: all columns."""
        return (Block.of(self.title, self.columns(), self.for_people().to_dicts(), self.note),)
