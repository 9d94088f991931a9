"""What a command of ``python -m lightning_qat`` consists of."""

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
        run: given the options, the script (None without) and the project's own arguments, does it and returns the exit
            status.
        usage: how it is called, if it is not about the user's project; then ``script`` is the first argument.
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
        help="checkpoint with the weights, as for trainer.fit; those that the project starts with if not given",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the files go; <default_root_dir>/lightning_qat if not given",
    )


def add_quantization_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command on a quantized model has."""
    parser.add_argument(
        "--calibration-batches",
        type=number_of_batches,
        metavar="N",
        help="calibrate with N batches, 0 for none; as the project's Calibration says if not given, else 8",
    )
    add_project_options(parser)


def number_of_batches(text: str) -> int:
    """Read a number of batches from the command line."""
    number = int(text) if text.isdecimal() else -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of batches, such as 8")
    return number
