"""A whole result as one text: plain text for files, Markdown for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_qat.analysis.results import Block, Result
from lightning_qat.reporting.advice import advice_markdown, advice_text
from lightning_qat.reporting.plain_text import one_line, printable
from lightning_qat.reporting.tables import escape_markdown, fixed_width, panel


def text_report(result: Result[Any], epoch: int | None = None) -> str:
    """Render everything as plain text, as wide as it needs to be: no name is cut, no line is wrapped.

    Args:
        result: what to render.
        epoch: the epoch it is about; its first line names it.

    Example:
        >>> from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
        >>> print(text_report(ModelCheckResult(())), end="")
        Model check: 0 errors, 0 warnings, 0 infos
    """
    first, *others = result.full_blocks()
    texts = _block_texts(first, "" if epoch is None else f" at the end of epoch {epoch}")
    for block in others:
        texts += _block_texts(block)
    return "\n\n".join(texts) + "\n"


def markdown_report(blocks: Iterable[Block], rows: int = 50, file: str = "") -> str:
    """Render advice and the first rows of every table as Markdown, for TensorBoard.

    Args:
        blocks: of a result.
        rows: rows per table, and names and lines of YAML per advice, at most.
        file: where the rest is; "the files" if not given.

    Example:
        >>> print(markdown_report([Block("Called times", ("name", "times"), (("a", 2),))]))
        **Called times**
        <BLANKLINE>
        ```
        name times
        ----------
        a        2
        ```
    """
    paragraphs: list[str] = []
    for block in blocks:
        paragraphs += [f"**{escape_markdown(block.title)}**"] if block.title else []
        paragraphs += [escape_markdown(block.note)] if block.note else []
        for number, advice in enumerate(block.advice, 1):
            paragraphs += advice_markdown(number, advice, rows, file)
        if block.columns:
            paragraphs.append(panel(block.columns, block.rows[:rows]))
        if (more := len(block.rows) - rows) > 0:
            every = f"The first {rows} of {len(block.rows)} rows; all are in the files."
            paragraphs.append(f"{more} more rows in {escape_markdown(file)}" if file else every)
    return "\n\n".join(paragraphs)


def _block_texts(block: Block, about: str = "") -> list[str]:
    """The paragraphs of a block."""
    title = f"{block.title}{about}" if block.title else ""
    if block.columns:
        head = fixed_width(block.columns, block.rows, title=title, note=block.note)
    else:
        head = "\n".join(line for line in (one_line(title), printable(block.note)) if line)
    return [head, *(advice_text(number, advice) for number, advice in enumerate(block.advice, 1))]
