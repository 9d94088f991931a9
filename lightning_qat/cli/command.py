"""The parts of a command of ``python -m lightning_qat``, and options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A command on the user's project.

    Args:
        name: the word on the command line.
        summary: one line for the list of commands.
        description: what it does and where the result goes.
        example: options that an example needs.
        add_options: adds its options to a parser.
        run: runs the command. It gets the options, the script (None if there is none) and the project's own arguments,
            and returns the exit status.
        usage: how the command is called, if it is not about the user's project. ``script`` is then its first argument.
    """

    name: str
    summary: str
    description: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, str | None, list[str]], int]
    usage: str = ""


def add_project_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command on the user's project has."""
    parser.add_argument(
        "--ckpt_path",
        metavar="FILE",
        help="checkpoint with the weights, as for trainer.fit; if not given, the project's initial weights are used",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="directory for the files; <default_root_dir>/lightning_qat if not given",
    )


def add_quantization_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command on a quantized model has."""
    parser.add_argument(
        "--calibration-batches",
        type=number_of_batches,
        metavar="N",
        help="calibrate with N batches, 0 for none; if not given, as the project's Calibration says, or with 8",
    )
    add_project_options(parser)


def number_of_batches(text: str) -> int:
    """Read a number of batches from the command line."""
    number = int(text) if text.isdecimal() else -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of batches: write one such as 8")
    return number
