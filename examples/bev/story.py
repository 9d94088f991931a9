"""The source document's story, told by the tool: from everything that is wrong to both tasks within 1 % of float.

    python examples/bev/story.py            # resumable: what is done is not done again
    python examples/bev/story.py --quick    # a few minutes: the same steps on less data, without the table of README.md

Every step is a command that a person could type. What is changed between two steps is what the reports of the step
before say: YAML is pasted, advised changes of code are made (see ``reports.py``).
"""

from __future__ import annotations

import argparse
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
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: find examples.bev

from examples.bev.chapters import METRICS, Chapter, meets, table, text, write_into
from examples.bev.configuration import (
    Settings,
    at_int8,
    callback,
    read,
    with_model,
    with_overrides,
    without,
    write,
)
from examples.bev.reports import BRIGHTNESS, Reports, rules

ROOT = Path(__file__).resolve().parents[2]
HERE, MAIN = Path("examples/bev"), "examples/bev/main.py"
TUNE = "tune"
SHARES = {"1%": 1, "2%": 1, "4.5%": 2}
"""Shares of the points to try at int16, from the smallest on, and how many times longer they train."""


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

    def calibrated(self, name: str, settings: Settings) -> Reports:
        """Calibrate, evaluate and analyse: a training of one step, with learning rate 0."""
        settings = self.quantized(settings, name)
        settings["model"]["lr"] = 0.0
        settings["trainer"]["max_steps"] = 1
        callback(settings, "QuantizationAwareTraining")["freeze_batch_norm_after"] = 0
        settings = without(settings, "ConvergenceMonitor")
        config = write(settings, self.root / f"{slug(name)}.yaml")
        chapter = self.chapter(name, self.python(MAIN, "fit", "--config", config))
        chapter.columns[name] = self.values(name, "calibrated")
        return self.reports(name)

    def trained(self, name: str, settings: Settings, longer: int = 1) -> Reports:
        """Train quantized, for so many times the usual epochs."""
        settings = without(self.quantized(settings, name), "SensitivityAnalysis", "LayerComparison")
        settings["trainer"]["max_epochs"] *= longer
        config = write(settings, self.root / f"{slug(name)}.yaml")
        chapter = self.chapter(name, self.python(MAIN, "fit", "--config", config))
        chapter.columns[name] = self.values(name, "QAT")
        chapter.said.append(f"ConvergenceMonitor: {self.reports(name).content('convergence')['note']}")
        return self.reports(name)

    def checked(self, name: str, settings: Settings) -> Reports:
        """Ask the model check, without a run."""
        settings = without(self.quantized(settings, name), "SensitivityAnalysis", "LayerComparison", "AccuracyTable")
        config = write(settings, self.root / f"{slug(name)}.yaml")
        folder = self.reports(name).folder
        self.chapter(name, self.tool("check", "--config", config, "--output", folder))
        return self.reports(name)

    def pipeline(self, name: str, settings: Settings) -> Reports:
        """Ask the pipeline check, with the fingerprint of the float run."""
        settings = without(self.quantized(settings, name), "SensitivityAnalysis", "LayerComparison", "AccuracyTable")
        config = write(settings, self.root / f"{slug(name)}.yaml")
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
        settings = without(self.quantized(settings, name), "SensitivityAnalysis", "LayerComparison", "AccuracyTable")
        config = write(settings, self.root / f"{slug(name)}.yaml")
        targets = [word for metric in METRICS for word in ("--target", f"{metric}=1%")]
        folder = self.root / slug(name)
        self.chapter(name, self.tool("tune", "--config", config, *targets, "--output", folder), failing=1)
        self.last.said.append((folder / "result.txt").read_text().strip().splitlines()[-1])

    # -- what steps are made of

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
        settings = with_model(settings)
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

    def reports(self, name: str) -> Reports:
        """The reports of a step."""
        return Reports(self.root / slug(name) / "lightning_qat")

    def values(self, name: str, stage: str) -> dict[str, float]:
        """Values of a step in the tool's table; of its latest try, if it was killed before."""
        runs = json.loads((self.root / "lightning_qat" / "result_table.json").read_text())["runs"]
        tries = [run for run in runs if re.fullmatch(re.escape(name) + r"( \(\d+\))?", run)]
        values = runs[max(tries, key=lambda run: (len(run), run))][stage]
        return {metric: values[metric] for metric in METRICS}

    def chapter(self, name: str, command: list[str], failing: int = 0) -> Chapter:
        """Begin a chapter with a command, and run it; what a try that was killed has left is removed."""
        if not (self.root / f"{slug(name)}.done").exists() and name != TUNE:  # tune goes on by itself
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


def quoted(rows: list[dict[str, Any]], most: int = 6) -> list[str]:
    """What rows of a report say, without the YAML."""
    lines = [
        f"{row.get('kind') or row['verdict']}: {row.get('what') or row['point'] + ': ' + row['evidence']}"
        for row in rows
    ]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


def pasted(story: Story, settings: Settings, rows: list[dict[str, Any]]) -> Settings:
    """Settings with what rows of a report print; the chapter says so."""
    new = rules(rows)
    story.last.said += quoted(rows)
    shown = [f"`{yaml.safe_dump(rule, default_flow_style=True, width=1000, sort_keys=False).strip()}`" for rule in new]
    if new:
        more = f" and {len(new) - 4} more" if len(new) > 4 else ""
        story.last.done.append(f"pasted {', '.join(shown[:4])}{more}")
    return with_overrides(settings, new)


def at_int16(story: Story) -> Settings:
    """From everything that is wrong to a model that reaches the target at int16."""
    settings = read(HERE / "configs" / "faults.yaml")
    first = story.calibrated("int16 calibration, first", settings)
    for finding, edit in first.edits():
        story.last.said += quoted([finding])
        story.last.done.append(f"changed the code at {finding['location']}: `{edit.arguments}`")
        settings = with_model(settings, **edit.arguments)
    settings = pasted(story, settings, first.pasted_diagnoses(("bad scale", "rounding", "clipping")))
    for attempt in ("model check", "model check, again"):
        rows = story.checked(attempt, settings).pasted_findings()
        if not rows:
            story.last.said.append("no error and no warning with something to paste")
            break
        settings = pasted(story, settings, rows)
    fixed = story.calibrated("int16 calibration, fixed inputs", settings)
    settings = pasted(story, settings, fixed.pasted_diagnoses(("bad scale", "clipping")))
    story.trained("int16 QAT, first", settings)
    blamed = story.pipeline("pipeline check", settings)
    settings = pasted(story, settings, fixed.pasted_diagnoses(("non-uniform",)))
    story.calibrated("int16 calibration, split dim_t", settings)
    if blamed.blames_training_images():
        settings = with_model(settings, **BRIGHTNESS.arguments)
        story.last.done.append(f"aligned the training script with the float one: `{BRIGHTNESS.arguments}`")
    story.trained("int16 QAT, pipeline fixed", settings)
    return settings


def at_int8_and_int16(story: Story, settings: Settings) -> Settings:
    """From int16 to the smallest share of int16 points that reaches the target."""
    narrow = at_int8(settings)
    collapsed = story.calibrated("int8 calibration", narrow)
    table_of_points = next(
        path for name in ("calibrated_sensitivity.csv", "sensitivity.csv") if (path := collapsed.folder / name).exists()
    )
    leading = [f"{row['point']} ({row['score']:.3g})" for row in collapsed.rows("sensitivity")[:9]]
    story.last.said += [f"most sensitive: {', '.join(leading)}", *quoted(collapsed.findings)]
    story.trained("int8 QAT", narrow)
    rule = {"sensitivity": str(table_of_points), "activation": {"dtype": "int16"}}
    best = with_overrides(narrow, [{**rule, "top": "leaders"}])
    story.calibrated("int8 + leaders int16, calibration", best)
    story.trained("int8 + leaders int16, QAT", best)
    for share, longer in SHARES.items():
        if meets(next(reversed(story.last.columns.values())), story.floats):
            break
        best = with_overrides(narrow, [{**rule, "top": share}])
        story.calibrated(f"int8 + top {share} int16, calibration", best)
        story.trained(f"int8 + top {share} int16, QAT", best, longer)
    return best


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description="The source document's story.")
    parser.add_argument("--quick", action="store_true", help="a few minutes, on less data; README.md is left alone")
    parser.add_argument(
        "--root", type=Path, help="where everything goes; logs/bev/story or logs/bev/quick if not given"
    )
    parser.add_argument("--without-tune", action="store_true", help="leave out the last step")
    options = parser.parse_args()
    root = options.root or Path("logs/bev", "quick" if options.quick else "story")
    os.chdir(ROOT)
    story = Story(root, QUICK if options.quick else Size())
    story.float_model()
    settings = at_int16(story)
    at_int8_and_int16(story, settings)
    if not options.without_tune:
        story.tuned(TUNE, at_int8(settings))
    print(table(story.chapters, story.floats))
    columns = {name: values for chapter in story.chapters for name, values in chapter.columns.items()}
    (root / "columns.json").write_text(json.dumps({"float": story.floats, **columns}, indent=1))
    write_into(root / "story.md" if options.quick else HERE / "README.md", text(story.chapters, story.floats))


if __name__ == "__main__":
    main()
