"""Exports every model of the zoo to ONNX and measures what onnxruntime computes: ``python -m tests.zoo.onnx_export``.

It writes ``onnx_export.md`` beside this file. An hour on one core, so rows are kept: ``--rows FILE`` continues where an
earlier run ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import lightning_qat
from examples.digits import DigitsClassifier
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.atomic_files import write_atomically
from lightning_qat.export.export_errors import ExportMismatchError
from lightning_qat.export.verification_result import ExportResult
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.zoo.kept_rows import keep_row, kept_rows
from tests.zoo.mixed_models import (
    MissingPackageError,
    Subject,
    efficientnet,
    efficientnet_on_mnist,
    efficientnet_trained_on_mnist,
    sentence_encoder,
)
from tests.zoo.models import ZOO, inputs, photograph_batch
from tests.zoo.table import versions

FILE = Path(__file__).with_name("onnx_export.md")
TYPES = ("int8", "int16", "mix")
SCALES = ("trained", "learned")
PROFILE = "onnxruntime_qdq"
STEPS = 3
EVERY = 3
"""In the mix, the activations of every third op are int16, and the others int8."""
Batch = dict[str, Any]
Quality = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Case:
    """One model with its data.

    Args:
        model: in eval mode.
        batches: of one size, to calibrate with and to train on.
        held_out: of that size too, for the task.
        loss: of a batch that has labels.
        output: path of the output that counts.
        task: the name of the measure of the task; empty without one.
        quality: the measure, from the outputs on all held-out batches and those of the float model.
        traced: what is traced besides the first batch.
    """

    model: nn.Module
    batches: list[Batch]
    held_out: list[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    output: str = ""
    task: str = ""
    quality: Quality | None = None
    traced: tuple[Batch, ...] = ()


@dataclass(frozen=True)
class Row:
    """What was measured with one model, its types and scales.

    Args:
        model: its name.
        types: ``int8``, ``int16`` or ``mix``; or the name of the profile, with uint8.
        scales: ``trained`` (from statistics, after some steps of QAT) or ``learned``.
        why_not: why torch.onnx cannot export it; everything else is then empty.
        quantizers: how many there are.
        codes: how many of their codes were compared.
        equal: share of equal codes for the same input of the quantizer.
        behind: the least share of equal codes for the same input of the ops in front, and the most steps.
        changes: for each setting, the mean difference of the worst output, relative to what quantization changes.
        output_codes: for each setting, share of equal codes of the worst quantized output, and steps; None without.
        integer: for each kind of op, how many are computed on integers, and how many there are.
        smaller: size of the float graph by that of the file.
        faster: time of the float graph by that of the file.
        task: the measure in float, with fake-quant and with onnxruntime; None without a task.
        task_name: its name.
        torch_task: the measure with fake-quant where torch computes without oneDNN, so adds in another order; None
            without a task.
    """

    model: str
    types: str
    scales: str
    why_not: str = ""
    quantizers: int = 0
    codes: int = 0
    equal: float = 0.0
    behind: tuple[float, int] = (1.0, 0)
    changes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    output_codes: Mapping[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    integer: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    smaller: float = 0.0
    faster: float = 0.0
    task: tuple[float, float, float] | None = None
    task_name: str = ""
    torch_task: float | None = None


def cases() -> dict[str, Callable[[], Case]]:
    """Return a maker of every model by its name."""
    found: dict[str, Callable[[], Case]] = {"digits (examples)": digits}
    found |= {name: lambda name=name: of_zoo(name) for name in ZOO if not name.startswith("EfficientNet")}  # type: ignore[misc]
    return {
        **found,
        "EfficientNet-Lite0": lite0,
        "EfficientNet-Lite0 on MNIST": lambda: lite0_on_mnist(efficientnet_on_mnist()),
        "EfficientNet-Lite0 trained on MNIST": lambda: lite0_on_mnist(efficientnet_trained_on_mnist()),
        "all-MiniLM-L6-v2": minilm,
    }


def digits() -> Case:
    """The example, trained for some epochs; 450 digits are held out."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 0.6
    labels = torch.from_numpy(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    model = DigitsClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    seen = len(labels) - 450
    for _ in range(8):
        for part in torch.randperm(seen)[: seen // 64 * 64].split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    wanted = labels[seen:]

    def accuracy(outputs: Tensor, _: Tensor) -> float:
        return float((outputs.argmax(1) == wanted).double().mean())

    batches = [{"images": images[p], "labels": labels[p]} for p in torch.arange(200).split(50)]
    held_out = [{"images": part} for part in images[seen:].split(50)]
    return Case(model.eval(), batches, held_out, _cross_entropy, "", "accuracy", accuracy)


def of_zoo(name: str) -> Case:
    """A model of ``transformers`` with random weights, which has no task. Language models keep no cache."""
    zoo_model = ZOO[name]
    model = zoo_model.make()
    cache = {"use_cache": False} if name.startswith(("Llama", "T5")) else {}
    batches = [{**batch, **cache} for batch in zoo_model.batches(2, 4)]
    return Case(model, batches, [], zoo_model.loss, zoo_model.outputs[0], traced=(batches[0],))


def lite0() -> Case:
    """ImageNet weights on crops of photographs: float's first class counts."""
    subject = efficientnet()
    more = [inputs(photograph_batch(8)) for _ in range(128)]
    any_labels = [torch.arange(8)] * len(subject.calibration)  # of 1,000 classes: nothing is evaluated on them
    batches = _labelled(subject.calibration, any_labels)
    return Case(subject.model, batches, more, _cross_entropy, "", subject.task, subject.quality)


def lite0_on_mnist(subject: Subject) -> Case:
    """EfficientNet-Lite0 with a head for digits: accuracy on those that are held out."""
    batches = _labelled(subject.calibration, subject.labels)
    return Case(subject.model, batches, subject.held_out, _cross_entropy, "", subject.task, subject.quality)


def minilm() -> Case:
    """A pretrained sentence encoder."""
    subject = sentence_encoder()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch).last_hidden_state.square().mean()  # type: ignore[no-any-return]

    return Case(
        subject.model,
        subject.calibration[:2],
        subject.held_out,
        loss,
        subject.output,
        subject.task,
        subject.quality,
    )


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(**inputs(batch)), batch["labels"])


def _labelled(batches: Iterable[Batch], labels: Iterable[Tensor]) -> list[Batch]:
    return [{**batch, "labels": of_batch} for batch, of_batch in zip(batches, labels, strict=True)]


def measure(name: str, make: Callable[[], Case], types: str, scales: str) -> Row:
    """Quantize, train some steps, export and compare one model."""
    case = make()
    region = _quantized(case, types)
    _train(case, region, scales)
    example = inputs(case.batches[0])
    row = Row(name, types, scales)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            result = lightning_qat.export_onnx(case.model, file, example)
        except (ConfigurationError, ExportMismatchError) as error:
            return dataclasses.replace(row, why_not=str(error))
        task, torch_task = _task(case, region, file) if case.quality is not None else (None, None)
    return dataclasses.replace(row, **_found(result), task=task, task_name=case.task, torch_task=torch_task)


def _quantized(case: Case, types: str) -> Region:
    activation: dict[str, Any] = {"dtype": "int8" if types == "mix" else types, "observer": "minmax"}
    options: dict[str, Any] = {}
    if types == PROFILE:
        activation |= {"dtype": "uint8", "scheme": "affine"}
        options["profile"] = PROFILE
    batches = [inputs(case.batches[0]), *case.traced]
    if types == "mix":
        region = insert(case.model, batches=batches, qconfig={"activation": activation})
        ops = list(dict.fromkeys(p.op for p in region.plan.points if not p.is_weight))
        region.remove()
        options["overrides"] = [{"match": op, "activation": {"dtype": "int16"}} for op in ops[::EVERY]]
    region = insert(case.model, batches=batches, qconfig={"activation": activation}, **options)
    calibrate(region, [inputs(batch) for batch in case.batches])
    return region


def _train(case: Case, region: Region, scales: str) -> None:
    """Some steps of QAT: scales follow the statistics, or are parameters."""
    region.set_state("quantize")
    if scales == "learned":
        region.learn_scales({"activation", "weight"})
    case.model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-4)
    for step in range(STEPS):
        optimizer.zero_grad()
        case.loss(case.model, case.batches[step % len(case.batches)]).backward()
        if nn.utils.clip_grad_norm_(case.model.parameters(), 0.1).isfinite():  # random networks have steep losses
            optimizer.step()
    case.model.eval()


def _task(case: Case, region: Region, file: Path) -> tuple[tuple[float, float, float], float]:
    """The measure in float, with fake-quant and with onnxruntime; and with fake-quant but without oneDNN."""
    assert case.quality is not None
    select = OutputSelector(case.output or None, None)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found: dict[str, list[Tensor]] = {"off": [], "quantize": [], "onnxruntime": [], "without oneDNN": []}
    for batch in case.held_out:
        with torch.no_grad():
            for state in ("off", "quantize"):
                with region.state(state):  # type: ignore[arg-type]
                    found[state] += select(case.model(**batch))
            with region.state("quantize"), _without_onednn():
                found["without oneDNN"] += select(case.model(**batch))
        fed = [leaf.numpy() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        found["onnxruntime"].append(torch.from_numpy(session.run(None, dict(zip(names, fed, strict=True)))[0]))
    outputs = {name: torch.cat(parts) for name, parts in found.items()}
    off, quantized, exported, other = (case.quality(part, outputs["off"]) for part in outputs.values())
    return (off, quantized, exported), other


@contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a setting for Intel GPUs, which torch's own switch touches too
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _found(result: ExportResult) -> dict[str, Any]:
    behind = [row for row in result.rows if row.equal_behind_op is not None]
    changes: dict[str, float] = {}
    codes: dict[str, tuple[float, int]] = {}
    for row in result.outputs:
        change = row.mean_difference / row.mean_quantization if row.mean_quantization else 0.0
        changes[row.optimization] = max(change, changes.get(row.optimization, 0.0))
        if row.equal_codes is not None:
            share, steps = codes.get(row.optimization, (1.0, 0))
            codes[row.optimization] = min(share, row.equal_codes), max(steps, row.steps or 0)
    return {
        "quantizers": len(result.rows),
        "codes": sum(row.codes for row in result.rows),
        "equal": min(row.equal for row in result.rows),
        "behind": (
            min((row.equal_behind_op or 0.0 for row in behind), default=1.0),
            max((row.steps_behind_op or 0 for row in behind), default=0),
        ),
        "changes": changes,
        "output_codes": codes,
        "integer": result.integer_counts(),
        "smaller": result.float_bytes / result.bytes,
        "faster": result.float_milliseconds / result.milliseconds if result.milliseconds else 0.0,
    }


INTRODUCTION = f"""# What onnxruntime computes of exported models

`python -m tests.zoo.onnx_export` measures this table, `make zoo` too. The models are those of [README](README.md), the
example of `examples/digits.py`, and those of [mixed precision](mixed_precision.md) with real weights:
EfficientNet-Lite0 on photographs, which have no labels, and on MNIST, with the labels of 2,500 images that are held
out, once with a new head on frozen weights and once with all weights trained; and a sentence encoder. Each is
calibrated, trained for {STEPS} steps of QAT and exported at opset 21. In the mix, the activations of every third op are
int16 and all else is int8. `{PROFILE}` is uint8 (affine) under this profile. Scales are those of statistics, or
learned.

- **(a)**: share of equal codes of all quantizers, each for the same input as in the model. Anything but 100 % is an
  error.
- **behind ops**: the least share of equal codes of one quantizer for the same input of the ops in front of it, whose
  sums onnxruntime adds in another order; and the largest difference in steps.
- **off, basic, full**: (b), from end to end, by the level of onnxruntime's optimizations: the mean difference of the
  worst output, in percent of what quantization itself changes; in brackets, where an output is quantized, the share of
  equal codes and the largest difference in steps. Codes that flip make others flip. In networks of random weights,
  which amplify every difference, 100 % says no more than that a flip is as large as a step of quantization. Where basic
  changes more than off, onnxruntime rounds biases; where full changes more than basic, it makes 8 bits of 16-bit inputs
  of matrix products. The report of an export names these causes, with the settings that avoid them.
- **task**: in float / with fake-quant / with onnxruntime at full optimization, in percent; in brackets with fake-quant
  where torch computes without oneDNN, so adds in another order: what the order of sums alone does to the task.
- **integer**: convolutions, matrix products and additions that onnxruntime computes on integers. The report of an
  export names the cause for every other one.
- **size, time**: of the same graph in float, divided by those of the file: above 1, the file is smaller or faster. Of
  small models, names take more room than weights.

OpenVINO, which this script does not run, opens, compiles and runs exported files on the CPU:
`tests/export/test_openvino.py`.
"""


def line(row: Row) -> str:
    """One row, as markdown."""
    head = f"| {row.model} | {row.types}, {row.scales} |"
    if row.why_not:
        return f"{head} not exported: {row.why_not} | | | | | | | |"
    ends = []
    for setting in ("off", "basic", "full"):
        text = f"{100 * row.changes[setting]:.3g}"
        if setting in row.output_codes:
            share, steps = row.output_codes[setting]
            text += f" ({_percent(share)}, {steps})"
        ends.append(text)
    counts = ", ".join(f"{some} of {count} {kind}s" for kind, (some, count) in row.integer.items())
    task = "" if row.task is None else f"{row.task_name}: " + " / ".join(f"{100 * value:.2f}" for value in row.task)
    if row.torch_task is not None:
        task += f" ({100 * row.torch_task:.2f})"
    behind = f"{_percent(row.behind[0])}, {row.behind[1]}"
    cells = [
        f"{_percent(row.equal)} of {row.codes:,}",
        behind,
        *ends,
        task,
        counts,
        f"{row.smaller:.2f}, {row.faster:.2f}",
    ]
    return " ".join([head, *(f"{cell} |" for cell in cells)])


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %" if share < 1 else "100 %"


def table(rows: Iterable[Row]) -> str:
    """The table, as markdown."""
    head = "| model | types, scales | (a) codes equal | behind ops | off | basic | full | task | integer | size, time |"
    return "\n".join([head, "|---" * 10 + "|", *map(line, rows)])


def document(rows: list[Row]) -> str:
    """The file: what holds in all rows, and the table, model by model."""
    exported = [row for row in rows if not row.why_not]
    codes = sum(row.codes for row in exported)
    models = len({row.model for row in exported})
    apart, of_torch = (
        _apart(exported, lambda row: row.task and row.task[2]),
        _apart(exported, lambda row: row.torch_task),
    )
    done = {(row.model, row.types, row.scales) for row in rows}
    missing = [(name, *pair) for name in cases() for pair in wanted(name) if (name, *pair) not in done]
    summary = (
        f"All {codes:,} codes of {len(exported)} exports of {models} models are equal in (a). "
        f"The task of onnxruntime is at most so many points from fake-quant's: {apart}. "
        f"That of fake-quant without oneDNN: {of_torch}."
    )
    if missing:
        summary += f" Not measured: {'; '.join(f'{name} ({types}, {scales})' for name, types, scales in missing)}."
    if any(row.equal < 1 for row in exported):
        summary = "**Codes differ in (a).**"
    order = {name: number for number, name in enumerate(cases())}
    kinds = [*TYPES, PROFILE]
    ordered = sorted(rows, key=lambda row: (order[row.model], kinds.index(row.types), SCALES.index(row.scales)))
    measured = f"{versions()[:-1]}; onnxruntime {onnxruntime.__version__}."
    return "\n".join([INTRODUCTION, measured, "", summary, "", table(ordered), ""])


def _apart(rows: list[Row], task: Callable[[Row], float | None]) -> str:
    """For each model, the most points between a task and that of fake-quant."""
    found: dict[str, float] = {}
    for row in rows:
        other = task(row)
        if row.task is not None and other is not None:
            found[row.model] = max(found.get(row.model, 0.0), abs(row.task[1] - other))
    return ", ".join(f"{name} {100 * most:.2f}" for name, most in found.items())


def wanted(name: str) -> list[tuple[str, str]]:
    """The types and scales that a model is measured with; variants of attention with one each."""
    if "eager" in name:
        return [("int8", "trained"), ("mix", "learned")]
    pairs = [("int8", "trained"), ("int16", "learned"), ("mix", "trained")]
    pairs += [("int8", "learned"), ("int16", "trained"), ("mix", "learned")]
    return [*pairs, (PROFILE, "trained")] if name.startswith(("digits", "EfficientNet")) else pairs


def main() -> None:
    """Measure and write; the rows are printed as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", metavar="WORD", help="only these models; print their rows and write nothing"
    )
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep rows here, and take those that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = stored(arguments.rows)
    chosen = {n: make for n, make in cases().items() if not arguments.only or any(w in n for w in arguments.only)}
    done = {(row.model, row.types, row.scales) for row in rows}
    number = max(len(wanted(name)) for name in chosen)
    for place in range(number):  # all models at one type first
        for name, make in chosen.items():
            for types, scales in wanted(name)[place : place + 1]:
                if (name, types, scales) in done:
                    continue
                try:
                    row = measure(name, make, types, scales)
                except MissingPackageError as error:
                    print(f"{name}: {error}")
                    continue
                rows.append(row)
                print(line(row), flush=True)
                keep_row(arguments.rows, row)
    if not arguments.only:
        write_atomically(FILE, document(rows))


def stored(file: Path | None) -> list[Row]:
    """The rows of an earlier run."""
    found = []
    for content in kept_rows(file):
        content["behind"] = tuple(content["behind"])
        for key in ("output_codes", "integer"):
            content[key] = {name: tuple(pair) for name, pair in content[key].items()}
        content["task"] = tuple(content["task"]) if content["task"] is not None else None
        found.append(Row(**content))
    return found


if __name__ == "__main__":
    main()
