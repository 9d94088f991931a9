"""What a stage is asked to do. It runs in a process of its own, which reads the request from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_qat.analysis.model_check.checked_region import role_of
from lightning_qat.atomic_files import json_value, write_atomically
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.reading.files import Document
from lightning_qat.tuning.manifest import StageOutcome
from lightning_qat.tuning.tuning_settings import TuningSettings

StageKind = Literal["float", "calibrated", "train", "search", "ladder"]


@dataclass(frozen=True)
class StageRequest:
    """What a stage is asked to do.

    Args:
        name: of the stage, for messages and reports.
        kind: ``float``: evaluate without fake-quant, after a model check. ``calibrated``: calibrate and evaluate.
            ``train``: fit. ``search``: measure errors and evaluate mixes. ``ladder``: is the pipeline to blame.
        dtype: the default type of all points.
        raised: names of the points at the wide type.
        folder: where everything goes.
        settings: of the tuning.
        float_metrics: of the float model, if they are known.
    """

    name: str
    kind: StageKind
    dtype: str
    raised: tuple[str, ...]
    folder: str
    settings: TuningSettings
    float_metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the request as the text of its file."""
        return json.dumps(json_value(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> StageRequest:
        """Read a file of :meth:`to_json`."""
        return Document(path, "the request of a stage", "start the tuning again").as_json(cls)


def raising(points: Iterable[str], dtype: str) -> list[dict[str, Any]]:
    """Return overrides that raise points to a type.

    Example:
        >>> raising(("fc.weight", "fc.output"), "int16")[1]
        {'match': 'fc.output', 'activation': {'dtype': 'int16'}}
    """
    return [{"match": name, role_of(name): {"dtype": dtype}} for name in points]


def write_outcome(folder: str, outcome: StageOutcome) -> None:
    """Write what a stage gave, for the process that asked for it."""
    write_atomically(Path(folder) / "outcome.json", json.dumps(json_value(outcome), indent=2) + "\n")


def read_outcome(folder: Path) -> StageOutcome:
    """Read what :func:`write_outcome` wrote.

    Raises:
        ConfigurationError: there is none: the stage has failed.
    """
    path = folder / "outcome.json"
    if not path.exists():
        raise ConfigurationError(f"the stage left no result in {folder}.")
    return Document(path, "the result of a stage", "start the tuning again").as_json(StageOutcome)
