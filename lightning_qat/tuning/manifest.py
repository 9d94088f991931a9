"""The state of a tuning on disk: which stages are done, what they gave, and what they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from lightning_qat.atomic_files import json_value, write_atomically
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.reading.checks import one_of
from lightning_qat.quantization.reading.files import Document
from lightning_qat.tuning.tuning_settings import FREE, TuningSettings, differing

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class StageOutcome:
    """What a stage gave.

    Args:
        metrics: by column (``float``, ``calibrated``, ``QAT``), every metric that was logged.
        raised: names of the points at the wide type.
        points: number of points.
        sizes: of a search: the ``chosen`` number of points, the smallest ``passing`` and the largest ``failing`` one.
        remarks: what was noticed, such as findings or a verdict.
        seconds: how long it took.
        times: of the float stage: seconds of an ``evaluation``, and of a ``training`` if that is known before one.
        inputs: SHA-256 of the files that the project reads beside those on its command line: weights, its own modules.
        made_from: what it was made from: SHA-256 of the project, and of the stages before it.
    """

    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    raised: tuple[str, ...] = ()
    points: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    seconds: float = 0.0
    times: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    made_from: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a tuning.

    Args:
        version: of the file.
        project: SHA-256 of the settings and of the files they name.
        settings: the settings, to say what differs.
        stages: the stages that are done, in order.
    """

    version: Annotated[int, one_of([MANIFEST_VERSION])]
    project: str
    settings: dict[str, Any]
    stages: dict[str, StageOutcome]


def without_times(outcome: StageOutcome) -> StageOutcome:
    """Return what a stage gave, apart from how long it took."""
    return replace(outcome, seconds=0.0, times={})


class ManifestFile:
    """The manifest in a folder; every stage that is done is written at once, by writing and renaming.

    Args:
        folder: of the tuning.
        settings: of this run of it.

    Raises:
        ConfigurationError: the folder holds the tuning of another project, or of other settings.
    """

    def __init__(self, folder: Path, settings: TuningSettings) -> None:
        self.path = folder / "manifest.json"
        own = json.loads(json.dumps(json_value(asdict(settings))))
        project = settings.project_hash()
        self.manifest = Manifest(MANIFEST_VERSION, project, own, {})
        if not self.path.exists():
            return
        remedy = "it was left as it is: write another --output, or remove the folder"
        found = Document(self.path, "the manifest of a tuning", remedy).as_json(Manifest)
        if found.project != project:
            what = differing(*({k: v for k, v in s.items() if k not in FREE} for s in (found.settings, own)))
            raise ConfigurationError(
                f"{folder} holds another tuning ({'; '.join(what) or 'the script or a file it is given has changed'}). "
                "Write another --output, or remove the folder to begin anew."
            )
        self.manifest = replace(found, settings=own)

    def outcome(self, stage: str) -> StageOutcome | None:
        """Return the outcome of a stage that is done."""
        return self.manifest.stages.get(stage)

    def drop(self, stage: str) -> None:
        """Forget a stage whose outcome does not hold any more."""
        stages = {name: outcome for name, outcome in self.manifest.stages.items() if name != stage}
        self.manifest = replace(self.manifest, stages=stages)
        self._write()

    def note(self, stage: str, outcome: StageOutcome) -> None:
        """Write that a stage is done."""
        stages = {**self.manifest.stages, stage: outcome}
        self.manifest = replace(self.manifest, stages=stages)
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps(json_value(self.manifest), indent=2) + "\n")
