"""Write what is found and what is missed: ``python -m tests.sabotage.table``.

It writes ``tests/sabotage/README.md``, and the confusion matrix in the ``README.md`` of the project.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import torch

from lightning_qat.reporting.tables import markdown
from tests.analysis.convergence.recorded import recorded_runs
from tests.sabotage.suite import Outcome, every_outcome

README = Path(__file__).parent / "README.md"
PROJECT_README = Path(__file__).parents[2] / "README.md"
_VERDICTS = ("pipeline misaligned", "hyperparameters", "quantization error", "healthy", "cannot tell")
_TEXT = """# What the checks find

Written by `python -m tests.sabotage.table`; checked by `tests/sabotage/test_sabotage.py` (a part of it in `make test`,
all of it in `make test-full`) and `tests/analysis/convergence/test_recorded_runs.py`.

## PipelineCheck: planted faults

Each fault is planted into the same healthy pipeline (`pipelines.py`: two convolutions with batch norm, dropout, two
terms of loss, AdamW, on the scanned digits). `PipelineCheck(reference=..., batches=40)` runs before training; the
reference is the fingerprint of the healthy float run. "cause named": the note holds the words that name what was
planted.

{confusion}

{faults}

Hyperparameters that prevent ("..., int8", "..., int3", "..., int2") destroy nothing; they keep training from moving
the weights. What is right was found by training to the end, ten epochs of QAT each. int8 loses nothing, and none of
them does harm. Calibration to int3 leaves 90 % and to int2 12 % of the answers right; healthy QAT then reaches 96 % and
71 %. With what is called hyperparameters here it reaches 91 to 94 % and 15 to 41 %. Weight decay 50 times and a warm-up
from ten times reach what healthy QAT reaches.

"batch norm with another eps", "dropout .9" and "another activation in the code" are settings of modules, neither
parameters nor buffers. "with a lambda" and its siblings call layers through a function that the module keeps, which a
deep copy of the module has to call on itself; where it cannot ("copies call the original") there is no verdict.

Where it is wrong: a weight decay that is a hundred times too strong does no harm within the batches of the check
(AdamW shrinks the weights by 4 % in 40 steps, and batch norm makes up for it), so no rung breaks and the verdict is
`healthy`; the note still names the difference to the float run. Nor does it later: after 40 epochs of QAT the
accuracy is 98.3 % with it and 98.0 % without. With decay as a part of Adam's gradient, and 400 batches, it is found.
`int3, which QAT mends` is no fault: a loss that training wins back must not be called a collapse.

Batches that are merely small do no harm here (batch norm still averages over the pixels of an image), so the planted
fault is small batches of data sorted by class.

## ConvergenceMonitor: recorded runs

Series of real runs, recorded by `python -m tests.sabotage.record` and judged as they came in: after 32, 64, 128 ...
steps and at the end of every epoch of {steps} steps. Delay: steps from the first quantized step to the first flag.
Faults that show in no series (a wrong checkpoint, a loss term, an evaluation that is wrong from the start) are not
here: nothing collapses, and only `PipelineCheck` can see them.

{summary}

{runs}
"""


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        outcomes = every_outcome(Path(directory))
    runs = recorded_runs()
    detections = [(run, run.detection()) for run in runs]
    healthy = [found for run, found in detections if not run.is_sick]
    sick = [found for run, found in detections if run.is_sick]
    delays = [f[0] for f in sick if f is not None]
    summary = (
        f"{len(healthy)} healthy runs, {sum(f is not None for f in healthy)} false alarms; {len(sick)} sick runs, "
        f"{len(delays)} found, after a median of {statistics.median(delays):g} steps."
    )
    rows = [
        [run.name, "sick" if run.is_sick else "healthy", found[1] if found else "silent", found[0] if found else None]
        for run, found in sorted(detections, key=lambda pair: (not pair[0].is_sick, pair[0].name))
    ]
    README.write_text(
        _TEXT.format(
            confusion=_confusion(outcomes),
            faults=_faults(outcomes),
            steps=runs[0].steps_per_epoch,
            summary=summary,
            runs=markdown(["run", "is", "verdict", "delay (steps)"], rows),
        )
    )
    _write_project_readme(outcomes)


def _write_project_readme(outcomes: list[Outcome]) -> None:
    text = PROJECT_README.read_text()
    right = sum(o.sabotage.verdict == "healthy" for o in outcomes)
    counts = f"({len(outcomes) - right} faults and {right} pipelines that are"
    text, counted = re.subn(r"\(\d+ faults and \d+ pipelines that are", counts, text)
    text, replaced = re.subn(
        r"\| right verdict / given .*?(?=\n\n)", lambda _: _confusion(outcomes).strip(), text, flags=re.S
    )
    assert (counted, replaced) == (1, 1)
    PROJECT_README.write_text(text)


def _confusion(outcomes: list[Outcome]) -> str:
    counts = Counter((o.sabotage.verdict, o.verdict) for o in outcomes)
    right = [verdict for verdict in _VERDICTS if any(o.sabotage.verdict == verdict for o in outcomes)]
    rows = [[verdict, *(counts[verdict, given] or None for given in _VERDICTS)] for verdict in right]
    return markdown(["right verdict / given", *_VERDICTS], rows)


def _faults(outcomes: list[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        rows.append(
            [
                outcome.sabotage.name,
                outcome.sabotage.verdict,
                outcome.verdict if outcome.is_right else f"WRONG: {outcome.verdict}",
                outcome.rung,
                outcome.names_the_cause,
            ]
        )
    return markdown(["planted", "right verdict", "given", "rung", "cause named"], rows)


if __name__ == "__main__":
    main()
