"""Summaries of a pipeline: the loaders' data, the model's inputs, and how often its outputs agree with the targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_qat.analysis.fingerprint.fingerprint import weight_digests
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummarizer, TensorSummary
from lightning_qat.callbacks.insertion.call_recorder import CallRecorder
from lightning_qat.callbacks.ladder.same_values import same_values
from lightning_qat.callbacks.passes.extra_batches import ExtraBatch, extra_batches
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.module_walk import is_in_region
from lightning_qat.quantization.modules.preservation import preserved_modes
from lightning_qat.quantization.modules.tensor_leaves import named_leaves


@dataclass(frozen=True)
class StageSummary:
    """One stage of a pipeline.

    Args:
        data: what the loader delivers.
        inputs: what the outermost modules receive.
        agreement: share of the integer targets that the outputs hit.
        constant_guess: share of the targets that the most frequent class alone would hit.
        swapped: modules whose weights during the step differ from those before it.
    """

    data: tuple[TensorSummary, ...]
    inputs: tuple[TensorSummary, ...]
    agreement: dict[str, float]
    constant_guess: dict[str, float]
    swapped: list[str]


def summarize(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, batches: int) -> StageSummary:
    """Run steps of a stage and summarize data, inputs of the model, and agreement of its outputs with the targets.

    Args:
        trainer: the running trainer.
        pl_module: its module; call this inside ``undisturbed``.
        stage: whose loader and step are used. Training steps run in train mode, except batch norm and dropout, whose
            effect on the outputs says nothing about labels.
        batches: batches on this rank.
    """
    data: dict[str, TensorSummarizer] = {}
    inputs: dict[str, TensorSummarizer] = {}
    agreement: dict[str, _Agreement] = {}
    before, swapped = weight_digests(pl_module) if stage == "validate" else {}, dict[str, None]()
    for extra in extra_batches(trainer, pl_module, batches, stage):
        _update(data, "", extra.batch)
        recorder = _record(trainer, pl_module, extra, stage)
        for path, calls in recorder.calls.items():
            for call in calls:
                _update(inputs, path or "model", (call.args, call.kwargs) if call.kwargs else call.args)
        for name, answers, target in _answers(extra.batch, recorder.results):
            agreement.setdefault(name, _Agreement()).update(answers, target)
        if before and not swapped:
            swapped |= {name: None for name, digest in weight_digests(pl_module).items() if before.get(name) != digest}
            before = {}
    return StageSummary(
        tuple(s.result() for s in data.values()),
        tuple(s.result() for s in inputs.values()),
        {name: found.share for name, found in agreement.items()},
        {name: found.constant_guess for name, found in agreement.items() if found.is_plausible},
        list(swapped),
    )


def evaluates_randomly(trainer: pl.Trainer, pl_module: pl.LightningModule, seed: int) -> bool:
    """Whether the same batch, evaluated twice, has different results although the model gets the same inputs.

    Causes are dropout that is active in evaluation, and sampling. Random preprocessing does not count: it changes the
    inputs.
    """
    stage = next((s for s in ("validate", "test") if _compat.attached_loader(trainer, s) is not None), None)
    if stage is None:
        return False
    with seeded(seed):
        extra = next(iter(extra_batches(trainer, pl_module, 1, stage)), None)  # type: ignore[arg-type]
    if extra is None:
        return False
    runs = []
    for number in range(2):
        with seeded(seed + number):
            runs.append(_record(trainer, pl_module, extra, stage))
    one, other = runs
    calls = [[(c.args, c.kwargs) for calls in r.calls.values() for c in calls] for r in runs]
    return _same(*calls) and not _same(one.results, other.results)


class _ResultRecorder(CallRecorder):
    """Keeps the results of the outermost calls as well."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__(modules, None)
        self.results: list[tuple[str, Any]] = []

    def _note(self, path: str, call: Call, outermost: bool, result: Any) -> None:
        before = self.total
        super()._note(path, call, outermost, result)
        if self.total > before:
            self.results.append((path, result))


def _record(trainer: pl.Trainer, pl_module: pl.LightningModule, extra: ExtraBatch, stage: str) -> _ResultRecorder:
    modules = {path: m for path, m in pl_module.named_modules() if not is_in_region(path)}
    recorder = _ResultRecorder(modules)
    with preserved_modes(pl_module), recorder.recording(), torch.no_grad():
        set_modes(pl_module, stage)
        run_step(trainer, pl_module, extra, stage)
    return recorder


def set_modes(pl_module: pl.LightningModule, stage: str) -> None:
    """Set the modes that a stage is summarized in: as in the run, but with batch norm and dropout in eval mode."""
    pl_module.train(stage == "train")
    for module in pl_module.modules() if stage == "train" else ():
        if is_batch_norm(module) or isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    if stage == "validate" and _compat.is_overridden("on_validation_model_eval", pl_module):
        _compat.call_hook(pl_module, "on_validation_model_eval")


def _update(summarizers: dict[str, TensorSummarizer], prefix: str, value: Any) -> None:
    for path, tensor in named_leaves(value):
        name = ".".join(part for part in (prefix, path) if part) or "batch"
        summarizers.setdefault(name, TensorSummarizer(name)).update(tensor)


class _Agreement:
    """Counts how often answers are the targets, and how often each target occurs."""

    def __init__(self) -> None:
        self._shares: list[float] = []
        self._counts = torch.zeros(0, dtype=torch.long)
        self._targets = 0
        self._classes = 0

    def update(self, answers: Tensor, target: Tensor) -> None:
        """Add a batch; ``answers`` has one axis of classes more than the target, as axis 1."""
        self._shares.append(float((answers.argmax(dim=1) == target).double().mean()))
        self._classes = answers.shape[1]
        self._targets += target.numel()
        possible = target[(target >= 0) & (target < self._classes)].long().flatten().cpu()  # others are ignored labels
        counts = torch.bincount(possible, minlength=max(self._classes, len(self._counts)))
        counts[: len(self._counts)] += self._counts
        self._counts = counts

    @property
    def share(self) -> float:
        """Mean share of the targets that the answers hit."""
        return sum(self._shares) / len(self._shares)

    @property
    def constant_guess(self) -> float:
        """Share of the targets that the most frequent class hits."""
        return float(self._counts.max()) / max(1, self._targets)

    @property
    def is_plausible(self) -> bool:
        """Whether the axis is one of classes: the features of an embedding far outnumber the classes in the targets."""
        seen = self._counts.nonzero()
        return bool(len(seen)) and self._classes <= 2 * (int(seen[-1]) + 1)


def _answers(batch: Any, results: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every integer tensor of the batch with every output that has one axis of classes more."""
    targets = [(name, t) for name, t in named_leaves(batch) if not t.is_floating_point() and not t.is_complex()]
    for path, result in results:
        for name, output in named_leaves(result):
            if not output.is_floating_point() or output.dim() < 2 or output.shape[1] < 2:
                continue
            for target_name, target in targets:
                if target.shape == output.shape[:1] + output.shape[2:] and target.dtype != torch.bool:
                    output_name = ".".join(part for part in (path or "model", name) if part)
                    yield f"{output_name}={target_name or 'batch'}", output, target


def _same(one: Any, other: Any) -> bool:
    first, second = dict(named_leaves(one)), dict(named_leaves(other))
    return first.keys() == second.keys() and all(same_values(first[name], second[name]) for name in first)
