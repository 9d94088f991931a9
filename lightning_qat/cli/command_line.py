"""``python -m lightning_qat``: parse the command line and run a command."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_qat import __version__
from lightning_qat.cli.analyse_command import ANALYSE
from lightning_qat.cli.check_command import CHECK
from lightning_qat.cli.command import Command
from lightning_qat.cli.compare_pipelines_command import COMPARE_PIPELINES
from lightning_qat.cli.compare_runs_command import COMPARE_RUNS
from lightning_qat.cli.expected_errors import EXPECTED, fail
from lightning_qat.cli.export_command import EXPORT
from lightning_qat.cli.fingerprint_command import FINGERPRINT
from lightning_qat.cli.inspect_command import INSPECT
from lightning_qat.cli.pipeline_check_command import PIPELINE_CHECK
from lightning_qat.cli.report_command import REPORT
from lightning_qat.cli.tune_command import TUNE

COMMANDS: tuple[Command, ...] = (
    FINGERPRINT,
    PIPELINE_CHECK,
    CHECK,
    INSPECT,
    ANALYSE,
    EXPORT,
    TUNE,
    REPORT,
    COMPARE_RUNS,
    COMPARE_PIPELINES,
)
_USAGE = "python -m lightning_qat {name} [SCRIPT] [ARGUMENTS AS FOR fit ...] [OPTIONS]"
_PROJECT = """
Your project:
  With LightningCLI, give the script and what you would write behind "fit":
    python -m lightning_qat {name} train.py --config fit.yaml{example}
  Without the script, if the configuration names the classes (model: {{class_path: ...}}):
    python -m lightning_qat {name} --config fit.yaml{example}
  Any other script is run with its own arguments, up to where it calls trainer.fit:
    python -m lightning_qat {name} train.py{example}
  Should an option of the script have the name of one below, write it behind "--".

It runs on one device, whatever the configuration says; the run itself is not started, and writes no checkpoint.
"""
_QUIET = (
    ".*does not have many workers which may be a bottleneck",
    ".*is smaller than the logging interval",
    ".*LeafSpec.*",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided.*",
    "Checkpoint directory .* exists and is not empty",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; that of this process if not given.

    Returns:
        The exit status: 0 for success; 1 if a check found something; 2 for an invalid command line or configuration.

    Example:
        >>> main(["check", "no_such_script.py"])
        2
    """
    words = list(sys.argv[1:] if argv is None else argv)
    behind: list[str] = []
    if "--" in words:
        place = words.index("--")
        words, behind = words[:place], words[place + 1 :]
    script = words.pop(1) if len(words) > 1 and not words[1].startswith("-") else None
    try:
        options, arguments = _parser().parse_known_args(words)
        command: Command = options.command
        with _quiet():
            return command.run(options, script, [*arguments, *behind])
    except SystemExit as error:  # argparse, LightningCLI or the script itself; they have said why
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except EXPECTED as error:
        return fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_qat",
        description="Find out why quantization-aware training fails, with the project's own configuration.",
        epilog='Write "python -m lightning_qat COMMAND --help" for what a command does and takes.',
    )
    parser.add_argument("--version", action="version", version=f"lightning_qat {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description
            + ("" if command.usage else _PROJECT.format(name=command.name, example=command.example)),
            usage=command.usage or _USAGE.format(name=command.name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_options(one)
        one.set_defaults(command=command)
    return parser


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Lightning's remarks about devices and seeds, and advice about speed; warnings are shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _QUIET:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
