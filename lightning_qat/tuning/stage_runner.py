"""Running the stages of a tuning, each in its own process; what is done is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_qat.atomic_files import json_value
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.tuning.manifest import ManifestFile, StageOutcome
from lightning_qat.tuning.stage_request import StageKind, StageRequest, read_outcome
from lightning_qat.tuning.tuning_settings import TuningSettings

LOG = "log.txt"


@dataclass
class StageRunner:
    """Runs stages and notes them in the manifest.

    Args:
        folder: of the tuning.
        manifest: its state.
        settings: what it is asked for.
        say: called with each line of progress.
        launch: runs a request and returns the exit status; in a process of its own if not given.
    """

    folder: Path
    manifest: ManifestFile
    settings: TuningSettings
    say: Callable[[str], None]
    launch: Callable[[Path], int] | None = None

    def run(
        self,
        name: str,
        kind: StageKind,
        dtype: str,
        *,
        raised: tuple[str, ...] = (),
        after: tuple[str, ...] = (),
        float_metrics: dict[str, float] | None = None,
    ) -> StageOutcome:
        """Run a stage, or return what it gave when it ran before from the same things.

        A stage that was killed goes on in its folder: a training from its last checkpoint, a search from its last
        evaluation.

        Args:
            name: of the stage; unique in the tuning.
            kind: what it does.
            dtype: the default type.
            raised: points at the wide type.
            after: names of the stages it was made from.
            float_metrics: of the float model.

        Raises:
            ConfigurationError: the stage has failed; the message names its log.
        """
        request = StageRequest(
            name,
            kind,
            dtype,
            raised,
            str(self.folder / name.replace(" ", "_")),
            self.settings,
            float_metrics or {},
        )
        made_from = self._made_from(request, after)
        done = self.manifest.outcome(name)
        if done is not None:
            if dict(done.made_from) == made_from:
                self.say(f"{name}: done before")
                return done
            self.say(f"{name}: made again, as a stage before it has changed")
            _forget(Path(request.folder))
        self.say(f"{name}: started")
        outcome = replace(self._launched(request), made_from=made_from)
        self.manifest.note(name, outcome)
        return outcome

    def _made_from(self, request: StageRequest, after: tuple[str, ...]) -> dict[str, str]:
        """SHA-256 of what a stage is made from: the project, its own request, and the stages before it."""
        own = [request.kind, request.dtype, list(request.raised), dict(request.float_metrics)]
        hashes = {"project": self.manifest.manifest.project, "request": _sha(own)}
        for name in after:
            before = self.manifest.outcome(name)
            if before is not None:
                hashes[name] = _sha(json_value(replace(before, seconds=0.0)))
        return hashes

    def _launched(self, request: StageRequest) -> StageOutcome:
        folder = Path(request.folder)
        path = request.write()
        (folder / "outcome.json").unlink(missing_ok=True)
        status = (self.launch or _in_own_process)(path)
        if status != 0:
            why = _last_error(folder / LOG)
            raise ConfigurationError(f"stage {request.name!r} failed: {why} (all of it: {folder / LOG})")
        return read_outcome(folder)


def _in_own_process(request: Path) -> int:
    """Run a request as ``python -m``; what it prints goes to the log of the stage."""
    command = [sys.executable, "-m", "lightning_qat.cli.tune_stage", str(request)]
    with open(request.with_name(LOG), "ab") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=_environment(), check=False).returncode


def _environment() -> dict[str, str]:
    """The stage imports the package from the same place as this process."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _last_error(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


def _forget(folder: Path) -> None:
    """Remove what would let a stage go on from another one's state; reports stay until they are written again."""
    for name in ("last.ckpt", "evaluations.json", "errors.json", "outcome.json"):
        (folder / name).unlink(missing_ok=True)


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
