"""Steps of the story: commands that are run once, with configurations made for them, and what came out."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from examples.bev.chapters import METRICS, Chapter, meets
from examples.bev.configuration import Settings, callback, read, without, write
from examples.bev.reports import Reports

ROOT = Path(__file__).resolve().parents[2]
HERE, MAIN = Path("examples/bev"), "examples/bev/main.py"


@dataclass
class Size:
    """How much is computed: of the story, and of its short form."""

    train_scenes: int = 3000
    val_scenes: int = 256
    float_epochs: int = 14
    epochs: int = 2
    batches: int = 60


QUICK = Size(train_scenes=640, val_scenes=64, float_epochs=8, epochs=1, batches=12)


class Story:
    """Runs the steps, and remembers what happened.

    Args:
        root: folder of everything that is written.
        size: how much is computed.
    """

    def __init__(self, root: Path, size: Size) -> None:
        self.root, self.size = root, size
        self.chapters: list[Chapter] = []
        self.floats: dict[str, float] = {}

    # -- steps

    def float_model(self) -> None:
        """Train in float, and let the float run describe itself."""
        settings = self.adapted(read(HERE / "configs" / "float.yaml"), "float")
        settings["trainer"]["max_epochs"] = self.size.float_epochs
        callback(settings, "ModelCheckpoint")["dirpath"] = str(self.root / "float")
        config = write(settings, self.root / "float.yaml")
        chapter = self.chapter("Float", self.python(MAIN, "fit", "--config", config))
        fingerprint = self.tool(
            "fingerprint", "--config", config, "--ckpt_path", self.checkpoint, "--output", self.root
        )
        self.run("fingerprint", fingerprint)
        self.floats = json.loads((self.root / "pipeline_fingerprint.json").read_text())["metrics"]
        chapter.said.append("; ".join(f"{name} {self.floats[name]:.1f}" for name in METRICS))

    def calibrated(self, name: str, settings: Settings, column: bool = True) -> Reports:
        """Calibrate, evaluate and analyse: a training of one step, with learning rate 0."""
        settings = self.quantized(settings, name)
        settings["model"]["lr"] = 0.0
        settings["trainer"]["max_steps"] = 1
        callback(settings, "QuantizationAwareTraining")["freeze_batch_norm_after"] = 0
        settings = without(settings, "ConvergenceMonitor")
        config = self.config(name, settings)
        chapter = self.chapter(name, self.python(MAIN, "fit", "--config", config))
        if column:
            chapter.columns[name] = self.values(name, "calibrated")
        return self.reports(name)

    def trained(self, name: str, settings: Settings, longer: int = 1) -> Reports:
        """Train quantized, for so many times the usual epochs."""
        settings = without(self.quantized(settings, name), "SensitivityAnalysis", "LayerComparison")
        settings["trainer"]["max_epochs"] *= longer
        config = self.config(name, settings)
        chapter = self.chapter(name, self.python(MAIN, "fit", "--config", config))
        chapter.columns[name] = self.values(name, "QAT")
        reports = self.reports(name)
        chapter.said.append(f"ConvergenceMonitor: {reports.content('convergence')['note']}")
        chapter.said.append(f"{reports.number_of_wide_points()} of {len(reports.points())} points at int16")
        return reports

    def checked(self, name: str, settings: Settings) -> Reports:
        """Ask the model check, without a run."""
        config = self.config_without_analyses(name, settings)
        folder = self.reports(name).folder
        self.chapter(name, self.tool("check", "--config", config, "--output", folder))
        return self.reports(name)

    def pipeline(self, name: str, settings: Settings) -> Reports:
        """Ask the pipeline check, with the fingerprint of the float run."""
        config = self.config_without_analyses(name, settings)
        folder = self.reports(name).folder
        options = ["--reference", self.root / "pipeline_fingerprint.json", "--batches", self.size.batches]
        command = self.tool("pipeline-check", "--config", config, *options, "--output", folder)
        chapter = self.chapter(name, command, failing=1)
        found = self.reports(name).content("pipeline_check")
        for rung, column in ((5, "float finetune"), (3, "float finetune, lr 0")):
            values = {row["metric"]: row["value"] for row in found["rows"] if row["rung"] == rung}
            if all(values.get(metric) is not None for metric in METRICS):
                chapter.columns[column] = {metric: values[metric] for metric in METRICS}
        chapter.said.append(found["note"])
        return self.reports(name)

    def tuned(self, name: str, settings: Settings) -> None:
        """Let the tool do the whole of it."""
        config = self.config_without_analyses(name, settings)
        targets = [word for metric in METRICS for word in ("--target", f"{metric}=1%")]
        folder = self.root / slug(name)
        command = self.tool("tune", "--config", config, *targets, "--output", folder)
        chapter = self.chapter(name, command, failing=1, resumes=True)
        chapter.said.append((folder / "result.txt").read_text().splitlines()[1])
        result = json.loads((folder / "result.json").read_text())
        if (found := result["recommended"]) is not None:
            values = {row["metric"]: row[found] for row in result["rows"]}
            chapter.columns[name] = {metric: values[metric] for metric in METRICS}

    # -- what steps are made of

    @property
    def missed(self) -> list[str]:
        """The tasks that miss the target in the latest column."""
        latest = next(values for chapter in reversed(self.chapters) for values in reversed(chapter.columns.values()))
        return [metric for metric in METRICS if not meets(latest, self.floats, (metric,))]

    @property
    def last(self) -> Chapter:
        """The chapter that is being written."""
        return self.chapters[-1]

    @property
    def checkpoint(self) -> Path:
        """Of the float run."""
        return self.root / "float" / "float.ckpt"

    def adapted(self, settings: Settings, name: str) -> Settings:
        """Settings with the story's folders and size."""
        settings = copy.deepcopy(settings)
        settings["data"].update(train_scenes=self.size.train_scenes, val_scenes=self.size.val_scenes)
        settings["data"]["folder"] = str(self.root.parent / "scenes")
        logger = {"save_dir": str(self.root), "name": slug(name), "version": ""}
        settings["trainer"].update(
            default_root_dir=str(self.root),
            enable_progress_bar=False,
            logger={"class_path": "CSVLogger", "init_args": logger},
        )
        return settings

    def quantized(self, settings: Settings, name: str) -> Settings:
        """Settings of a quantized run of this name."""
        settings = without(self.adapted(settings, name), "ModelCheckpoint")
        settings["trainer"]["max_epochs"] = self.size.epochs
        settings["trainer"]["enable_checkpointing"] = False
        callback(settings, "QuantizationAwareTraining")["init_from"] = str(self.checkpoint)
        callback(settings, "AccuracyTable")["name"] = name
        return settings

    def config(self, name: str, settings: Settings) -> Path:
        """Write the configuration of a step."""
        return write(settings, self.root / f"{slug(name)}.yaml")

    def config_without_analyses(self, name: str, settings: Settings) -> Path:
        """Write the configuration of a command that makes its own reports."""
        settings = without(self.quantized(settings, name), "SensitivityAnalysis", "LayerComparison", "AccuracyTable")
        return self.config(name, settings)

    def reports(self, name: str) -> Reports:
        """The reports of a step."""
        return Reports(self.root / slug(name) / "lightning_qat")

    def values(self, name: str, stage: str) -> dict[str, float]:
        """Values of a step in the tool's table; of its latest try, if it was killed before."""
        runs = json.loads((self.root / "lightning_qat" / "result_table.json").read_text())["runs"]
        tries = [run for run in runs if re.fullmatch(re.escape(name) + r"( \(\d+\))?", run)]
        values = runs[max(tries, key=lambda run: (len(run), run))][stage]
        return {metric: values[metric] for metric in METRICS}

    def chapter(self, name: str, command: list[str], failing: int = 0, resumes: bool = False) -> Chapter:
        """Begin a chapter with a command, and run it; unless it resumes, what a killed try has left is removed."""
        if not resumes and not (self.root / f"{slug(name)}.done").exists():
            shutil.rmtree(self.root / slug(name), ignore_errors=True)
        self.chapters.append(Chapter(name, " ".join(map(shlex.quote, command)).replace(sys.executable, "python")))
        self.run(slug(name), command, failing)
        return self.last

    def run(self, name: str, command: list[str], failing: int = 0) -> None:
        """Run a command, unless it has run before; its output is kept.

        Args:
            name: of the files.
            command: what to run, in the repository's folder.
            failing: an exit status that is no failure.

        Raises:
            SystemExit: the command has failed.
        """
        done = self.root / f"{name}.done"
        if done.exists():
            return
        print(f"{name}: {' '.join(command[1:])}", flush=True)
        start = time.monotonic()
        output = self.root / f"{name}.txt"
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w") as file:
            status = subprocess.run(command, cwd=ROOT, env=surroundings(), stdout=file, stderr=file, check=False)
        if status.returncode not in (0, failing):
            raise SystemExit(f"{name} has failed (exit status {status.returncode}): see {output}")
        done.write_text(f"{time.monotonic() - start:.0f} s\n")

    def python(self, *words: object) -> list[str]:
        """A command of the example's own script."""
        return [sys.executable, *map(str, words)]

    def tool(self, command: str, *words: object) -> list[str]:
        """A command of the tool on the example's script."""
        return self.python("-m", "lightning_qat", command, MAIN, *words)


def surroundings() -> dict[str, str]:
    """Variables of the environment for commands: they find the package where this file is."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
