"""Running the stages of a tuning, each in its own process; what is done is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_qat.atomic_files import json_value, write_atomically
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.tuning.manifest import ManifestFile, StageOutcome, without_times
from lightning_qat.tuning.stage_request import StageKind, StageRequest, read_outcome
from lightning_qat.tuning.stage_work import EVALUATIONS
from lightning_qat.tuning.tuning_settings import TuningSettings, file_hash

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
            str(self.stage_folder(name)),
            self.settings,
            float_metrics or {},
        )
        made_from = self._made_from(request, after)
        done = self.manifest.outcome(name)
        if done is not None:
            changed = [path for path, digest in done.inputs.items() if _hash_if_there(Path(path)) != digest]
            if dict(done.made_from) == made_from and not changed:
                self.say(f"{name}: done before")
                return done
            self.say(f"{name}: made again, as {changed[0] if changed else 'what it was made from'} has changed")
            if changed:  # before the stage is dropped: then nothing else tells what has changed
                self._forget_begun(name)
            self.manifest.drop(name)
            _forget(Path(request.folder))
        self.say(f"{name}: started")
        outcome = replace(self._launched(request), made_from=made_from)
        self.manifest.note(name, outcome)
        return outcome

    def forget(self, name: str) -> None:
        """Let a stage run once more, from its beginning.

        Raises:
            ConfigurationError: it has not run.
        """
        if not self.manifest.manifest.stages:
            raise ConfigurationError(f"stage to repeat {name!r}: no stage has run in {self.folder} yet.")
        if self.manifest.outcome(name) is None:
            raise unknown_choice("stage to repeat", name, self.manifest.manifest.stages)
        self.manifest.drop(name)
        _forget(self.stage_folder(name))

    def _forget_begun(self, name: str) -> None:
        """Let a stage, and those that were killed, begin anew: what they have was made from files that have changed."""
        done = {self.stage_folder(other) for other in self.manifest.manifest.stages if other != name}
        for request in self.folder.glob("*/request.json"):
            if request.parent not in done:
                _forget(request.parent)
                (request.parent / EVALUATIONS).unlink(missing_ok=True)

    def stage_folder(self, name: str) -> Path:
        """Return where a stage has its configuration, checkpoint and reports."""
        return self.folder / name.replace(" ", "_")

    def _made_from(self, request: StageRequest, after: tuple[str, ...]) -> dict[str, str]:
        """SHA-256 of what a stage is made from: the project, its own request, and the stages before it."""
        own: list[object] = [request.kind, request.dtype, list(request.raised), dict(request.float_metrics)]
        if request.kind == "search":
            own += [request.settings.target, list(request.settings.metrics)]
        hashes = {"project": self.manifest.manifest.project, "request": _sha(own)}
        for name in after:
            before = self.manifest.outcome(name)
            if before is not None:
                hashes[name] = _sha(json_value(without_times(before)))
        return hashes

    def _launched(self, request: StageRequest) -> StageOutcome:
        folder = Path(request.folder)
        text, path = request.to_json(), folder / "request.json"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            if (folder / "outcome.json").exists():  # killed before the manifest was written
                return read_outcome(folder)
        else:
            _forget(folder)
            write_atomically(path, text)
        log, began = folder / LOG, time.monotonic()
        before = log.stat().st_size if log.exists() else 0
        status = (self.launch or _in_own_process)(path)
        if status != 0:
            raise ConfigurationError(
                f"stage {request.name!r} failed: {_last_error(log, before, status)} (all of it: {log})"
            )
        return replace(read_outcome(folder), seconds=time.monotonic() - began)  # with all that comes before the work


def _in_own_process(request: Path) -> int:
    """Run a request as ``python -m``; what it prints goes to the log of the stage."""
    command = [sys.executable, "-m", "lightning_qat.cli.tune_stage", str(request)]
    with open(request.with_name(LOG), "ab") as log:
        # the pipe is never written to: its end tells the stage that this process has ended
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=_environment()
        )
        try:
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            if process.stdin is not None:
                process.stdin.close()


def _environment() -> dict[str, str]:
    """The stage imports the package from the same place as this process."""
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _last_error(log: Path, before: int, status: int) -> str:
    """Return what a stage said last: its one-line error if it ended with one, else its last line."""
    if status < 0:
        return f"it was ended by signal {-status}"
    content = log.read_bytes()[before:] if log.exists() else b""
    lines = [line.strip() for line in content.decode("utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ((errors if status == 2 else []) or lines or ["no output"])[-1]


def _hash_if_there(path: Path) -> str:
    return file_hash(path) if path.is_file() else ""


def _forget(folder: Path) -> None:
    """Remove what would let a stage go on from another one's state. Errors and evaluations name what they belong to."""
    for name in ("last.ckpt", "outcome.json"):
        (folder / name).unlink(missing_ok=True)


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
