"""Names are data: what they hold neither moves the cursor of a terminal nor breaks a line nor names a strange file."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any

from rich.text import Text

_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Controls, invisible characters (some change the order of what stands around), halves of characters, separators."""
_KEPT = "\n\t\u200c\u200d"
"""Lines are lines; joiners belong to the words of some scripts."""
_LONGEST_NAME, _LONGEST_FOREIGN_NAME = 120, 50
"""In characters: file systems take 255 bytes, and a letter may have four."""


def printable(text: str) -> str:
    r"""Escape the characters that a terminal obeys or does not show. Line breaks (``\n``) stay.

    Args:
        text: what a person will read.

    Example:
        >>> printable("layer\x1b[2J1\u2028" + "ü\n")
        'layer\\x1b[2J1\\u2028ü\n'
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def one_line(text: str) -> str:
    """The same in one line: blanks and line breaks become one blank each.

    Example:
        >>> one_line("a\\n  b\\rc")
        'a b\\\\rc'
    """
    return text if text.isprintable() else printable(" ".join(filter(None, re.split(r"[ \t\n]+", text))))


def literal(text: str, **options: Any) -> Text:
    """Return text for the terminal that rich takes literally: no markup, no emoji.

    Args:
        text: what to show.
        **options: of rich's ``Text``, such as ``style``.
    """
    return Text(printable(text), **options)


def file_name(name: str) -> str:
    """Return a file name for any name; it can be read, and works on every file system.

    A long name loses its middle and gains a digest of the whole, so that different names stay different.

    Example:
        >>> file_name("encoder/layers.0 [x].output"), len(file_name("block." * 50))
        ('encoder_layers.0__x_.output', 120)
    """
    found = re.sub(r"[^\w.@-]", "_", name)
    longest = _LONGEST_NAME if found.isascii() else _LONGEST_FOREIGN_NAME
    if len(found) <= longest:
        return found if found.strip(".") else f"_{found}"
    middle = f"...{digest(name)}..."
    half = (longest - len(middle)) // 2
    return f"{found[:half]}{middle}{found[half + len(middle) - longest :]}"


def digest(name: str) -> str:
    """Return eight letters that tell a name apart from others."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _shown(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape").decode()
