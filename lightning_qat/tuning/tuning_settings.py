"""What a tuning is asked for: the project, the types, the targets, the limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from lightning_qat.analysis.mixed_precision.point_quantizers import ordered_dtypes
from lightning_qat.analysis.runs.accuracy import target_value
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.reading.checks import AT_LEAST_ONE

StageName = Literal["float", "wide calibrated", "wide QAT", "narrow calibrated", "narrow QAT", "search", "mixed QAT"]
"""The stages in their order. ``wide`` and ``narrow`` stand for the types, such as int16 and int8."""

FREE = ("explore", "trainings", "skip", "target", "metrics")
"""Settings that may change from one start of a tuning to the next: no stage rests on them, or its own hash says so."""

SKIPPABLE: tuple[StageName, ...] = ("wide calibrated", "wide QAT", "narrow QAT", "mixed QAT")


@dataclass(frozen=True)
class TuningSettings:
    """What a tuning is asked for.

    Args:
        script: the script that trains; None for a configuration that names its classes.
        arguments: those of the script, as for ``fit``.
        narrow: the type that most points shall have.
        wide: the type that points are raised to.
        target: how much worse than float the metrics may be, or their values; for all scores, or by metric.
        metrics: the metrics that count; all scores (or the keys of the target) if empty.
        always: points that are raised in any case.
        ckpt_path: checkpoint for ``trainer.fit``; None for the project's own.
        skip: stages that are left out.
        explore: go on after the target is met, for the whole front.
        evaluations: most evaluations of the search.
        trainings: most trainings with a mix.
        batches: batches on which the errors of the points are measured.
        output: which output of the quantized region they are measured at; None for the whole output.
    """

    script: str | None
    arguments: tuple[str, ...]
    narrow: str = "int8"
    wide: str = "int16"
    target: str | float | dict[str, str | float] = "1%"
    metrics: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    ckpt_path: str | None = None
    skip: tuple[str, ...] = ()
    explore: bool = False
    evaluations: Annotated[int, AT_LEAST_ONE] = 8
    trainings: Annotated[int, AT_LEAST_ONE] = 3
    batches: Annotated[int, AT_LEAST_ONE] = 4
    output: str | None = None

    def __post_init__(self) -> None:
        if ordered_dtypes((self.narrow, self.wide)) != (self.narrow, self.wide):
            raise ConfigurationError(f"dtypes: write the narrow type first: {self.wide},{self.narrow}.")
        for one in self.target.values() if isinstance(self.target, dict) else [self.target]:
            target_value("", 1.0, one)
        for name in self.skip:
            if name not in SKIPPABLE:
                raise unknown_choice("stage to skip", name, SKIPPABLE)

    def project_hash(self) -> str:
        """Return the SHA-256 of what all stages rest on: the settings that are not free, and the files they name."""
        named = [self.script, *self.arguments, *(a.partition("=")[2] for a in self.arguments), self.ckpt_path]
        files = {name: file_hash(Path(name)) for name in named if name and Path(name).is_file()}
        settings = {key: value for key, value in asdict(self).items() if key not in FREE}
        return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()


def read_target(texts: Iterable[str]) -> str | float | dict[str, str | float]:
    """Read targets of a command line: ``1%``, or ``val_acc=0.97`` and ``mAP=1%``.

    Raises:
        ConfigurationError: one for all metrics and ones by metric are mixed.

    Example:
        >>> read_target(["0.5%"]), read_target(["val_acc=0.97", "mAP=1%"])
        ('0.5%', {'val_acc': 0.97, 'mAP': '1%'})
    """
    given = list(texts) or ["1%"]
    by_metric = {name: _number_or_share(value) for name, sep, value in (t.partition("=") for t in given) if sep}
    if by_metric and len(by_metric) == len(given):
        return by_metric
    if len(given) > 1:
        raise ConfigurationError(
            f"targets {', '.join(given)}: write one for all scores (1%), or one per metric (val_acc=1%)."
        )
    return _number_or_share(given[0])


def _number_or_share(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def default_directory(script: str | None) -> Path:
    """Return where a tuning goes if no directory is given."""
    return Path(f"tuning_{Path(script).stem}" if script else "tuning")


def differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return the names of the settings that differ, with both values."""
    names: Sequence[str] = list(dict.fromkeys([*before, *now]))
    return [f"{n}: {before.get(n)!r} there, {now.get(n)!r} here" for n in names if before.get(n) != now.get(n)]
