"""Base of all results: frozen rows that say what they hold. How that looks is decided in ``reporting``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Advice:
    """One thing to do something about.

    Args:
        heading: what it is, in a few words.
        level: how much it matters: ``error``, ``warning`` or ``info``.
        text: what is the case, in a sentence.
        names: ops, points or modules concerned.
        facts: more about it: labels and what they say.
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
        """Take some columns of rows that are given by column."""
        return cls(title, tuple(columns), tuple(tuple(row[column] for column in columns) for row in rows), note)

    def only(self, columns: Sequence[str]) -> Block:
        """The same block with some of its columns."""
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
        """What the table is about, or what follows from it, in a sentence."""
        return ""

    @property
    def verdict(self) -> str:
        """The word or two that the note begins with, if it gives a verdict."""
        return ""

    def columns(self) -> tuple[str, ...]:
        """Names of all columns; empty without rows."""
        return tuple(f.name for f in dataclasses.fields(self.rows[0])) if self.rows else ()  # type: ignore[arg-type]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of primitives."""
        return [dataclasses.asdict(row) for row in self.rows]  # type: ignore[call-overload]

    def about(self) -> dict[str, Any]:
        """What is known beside the rows; a JSON file holds it."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}

    def blocks(self) -> tuple[Block, ...]:
        """What a person reads at a glance, on the terminal and in the loggers: the ``shown`` columns."""
        return (Block.of(self.title, self.shown or self.columns(), self.to_dicts(), self.note),)

    def full_blocks(self) -> tuple[Block, ...]:
        """The same with everything there is, for a text file: all columns."""
        return (Block.of(self.title, self.columns(), self.to_dicts(), self.note),)
