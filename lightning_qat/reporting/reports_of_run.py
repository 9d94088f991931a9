"""Reports of a run that must not end it: a full disk, a lost folder, a logger that fails, a closed terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning_qat.analysis.results import Result
from lightning_qat.reporting.files import Format, write_result

T = TypeVar("T")


class RunReports:
    """The reports of one callback in a run. One that fails warns and is given up or tried again; the run goes on.

    A file that could not be written is tried again whenever another one is written, and by :meth:`finish`. There is
    one warning per folder and reason, and one per logger.

    Args:
        warn: called with what went wrong, such as ``warnings.warn``.
        tell: called with what became of it.

    Attributes:
        missing: files that were not written when the latest run ended, with the reason.
    """

    def __init__(self, warn: Callable[[str], Any], tell: Callable[[str], Any]) -> None:
        self.warn = warn
        self._tell = tell
        self.missing: dict[Path, str] = {}
        self._owed: dict[Path, Callable[[], Any]] = {}
        self._reasons: dict[Path, str] = {}
        self._warned: set[tuple[str, str]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owed": {}}  # of this process

    def write(self, path: str | os.PathLike[str], write: Callable[[], Any]) -> bool:
        """Write a file, and those that could not be written before.

        Args:
            path: the file.
            write: writes it as a whole. If it fails, it is called again later.

        Returns:
            Whether the file was written.
        """
        place = Path(path)
        self._owed.pop(place, None)
        self.retry()
        return self._tried(place, write)

    def write_result(
        self,
        result: Result[Any],
        directory: str | os.PathLike[str],
        name: str,
        formats: Sequence[Format] = ("csv", "txt", "json"),
    ) -> str:
        """Write a result as ``<name>.<format>`` in every format.

        Args:
            result: what to write.
            directory: made if missing.
            name: first part of the file names.
            formats: which files.

        Returns:
            The path of the first; empty if it could not be written.
        """
        paths = {Path(directory) / f"{name}.{format}": format for format in formats}
        written = [self.write(p, partial(write_result, result, directory, name, (f,))) for p, f in paths.items()]
        return str(next(iter(paths))) if written[0] else ""

    def retry(self) -> None:
        """Write what could not be written before."""
        for path, write in list(self._owed.items()):
            if self._tried(path, write):
                self._tell(f"{path} is written now.")

    def finish(self) -> None:
        """Write what could not be written before, say what is still missing, and forget it. Call it as a run ends."""
        self.retry()
        self.missing = {path: self._reasons[path] for path in self._owed}
        if self.missing:
            self._tell(f"Not written in this run: {', '.join(map(str, self.missing))}.")
        self._owed, self._warned = {}, set()

    def send(self, loggers: Iterable[Any], send: Callable[[list[Any]], Sequence[str] | None]) -> list[str]:
        """Send something to every logger; a logger that fails does not keep the others from getting it.

        Args:
            loggers: ``trainer.loggers``.
            send: called with a list of one logger.

        Returns:
            What all these calls returned: the class names of loggers that cannot show it.
        """
        found: list[str] = []
        for logger in loggers:
            name = type(logger).__name__
            without = self.attempt(partial(send, [logger]), f"{name} did not take a report", name)
            found += without or ()
        return found

    def attempt(self, action: Callable[[], T], what: str, key: str = "") -> T | None:
        """Do something for a report; None if it fails.

        Args:
            action: what to do.
            what: what has not happened then, as the beginning of a warning.
            key: there is one warning for each key and reason; ``what`` if not given.
        """
        try:
            return action()
        except Exception as error:  # loggers and terminals fail in their own ways, and no report is worth a run
            self._warn_once(key or what, error, f"{what} ({_reason(error)}). Training goes on.")
            return None

    def _tried(self, path: Path, write: Callable[[], Any]) -> bool:
        try:
            write()
        except Exception as error:  # no report is worth a run
            self._owed[path], self._reasons[path] = write, _reason(error)
            self._warn_once(
                str(path.parent),
                error,
                f"{path} could not be written ({_reason(error)}). Training goes on. Every file that cannot be written "
                "is tried again with the next report, and when the run ends.",
            )
            return False
        self._owed.pop(path, None)
        return True

    def _warn_once(self, key: str, error: Exception, text: str) -> None:
        about = (key, _reason(error))
        if about not in self._warned:
            self._warned.add(about)
            self.warn(text)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
