"""The environment of a script that a command runs: a Trainer on one device, a LightningCLI that fits, arguments."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from lightning_qat.cli.configuration_errors import readable


def on_one_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ``__init__`` of Trainer that ignores how many devices it is asked for."""

    @functools.wraps(original)
    def __init__(self: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **one_device(kwargs))

    return __init__


def one_device(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Trainer's arguments for one device: other ranks would run the script again, and train.

    The first named device is kept. Strategies that shard the model are kept too: they cause an error elsewhere.

    Example:
        >>> one_device({"devices": [2, 3], "strategy": "ddp", "precision": "bf16-mixed"})
        {'devices': [2], 'strategy': 'auto', 'precision': 'bf16-mixed', 'num_nodes': 1}
    """
    devices, strategy = arguments.get("devices", "auto"), arguments.get("strategy", "auto")
    if isinstance(devices, str) and "," in devices:
        devices = [int(number) for number in devices.split(",") if number.strip()]
    if devices not in (0, "0", []):  # Lightning says what is wrong with those
        devices = list(devices[:1]) if isinstance(devices, (list, tuple)) else 1
    if type(strategy) is DDPStrategy or (isinstance(strategy, str) and strategy.startswith("ddp")):
        strategy = "auto"
    return {**arguments, "devices": devices, "strategy": strategy, "num_nodes": 1}


def fitting(original: Callable[..., Any], seen: list[LightningCLI] | None = None) -> Callable[..., Any]:
    """Let a LightningCLI fit, unless it is told another subcommand, or has none.

    A mistake in its arguments is one error, not pages of options.

    Args:
        original: ``LightningCLI.__init__``.
        seen: the LightningCLI is appended to it.
    """

    @functools.wraps(original)
    def __init__(self: LightningCLI, *args: Any, **kwargs: Any) -> None:
        if seen is not None:
            seen.append(self)
        given = inspect.signature(original).bind(self, *args, **kwargs)
        words = sys.argv[1:2]
        if (
            given.arguments.get("run", True)
            and given.arguments.get("args") is None
            and not (words and words[0] in self.subcommands())
        ):
            sys.argv.insert(1, "fit")
        options = given.arguments.get("parser_kwargs") or {}
        raising = {name: {**options.get(name, {}), "exit_on_error": False} for name in self.subcommands()}
        given.arguments["parser_kwargs"] = {**options, "exit_on_error": False, **raising}
        try:
            original(*given.args, **given.kwargs)
        except Exception as error:
            if (short := readable(error)) is None:
                raise
            raise short from error

    return __init__


@contextmanager
def command_line(script: str | None, arguments: Sequence[str]) -> Iterator[None]:
    """Set ``sys.argv`` and ``sys.path`` as ``python script.py arguments`` has them."""
    argv, path = sys.argv, sys.path
    sys.argv = [script or "lightning_qat", *arguments]
    sys.path = [str(Path(script).resolve().parent) if script else str(Path.cwd()), *path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


@contextmanager
def replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a class in a block."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
