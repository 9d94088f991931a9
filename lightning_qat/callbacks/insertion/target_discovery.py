"""Find the targets by running the steps, and the calls to trace them with."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_debug  # type: ignore[attr-defined]

from lightning_qat.callbacks.insertion.call_recorder import CallRecorder
from lightning_qat.callbacks.insertion.module_flow import ModuleFlow
from lightning_qat.callbacks.insertion.trained_parts import gradient_leaves, parts_of_the_model, warn_about_helpers
from lightning_qat.callbacks.passes.calibration_batches import calibration_owner
from lightning_qat.callbacks.passes.extra_batches import ExtraBatch, extra_batches
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.quantized_run import ScaleSource
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.quantization.errors import TracingError, near_names
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.module_walk import has_lazy_tensors

AUTO = "auto"


def captured_calls(
    trainer: pl.Trainer, pl_module: pl.LightningModule, target: str | list[str], batches: int, train_mode: bool = True
) -> dict[str, list[Call]]:
    """Run a few steps and return the calls of each target, by path (``""`` is the module itself).

    Args:
        trainer: the running trainer.
        pl_module: the module whose steps run.
        target: ``auto``, a path, or several.
        batches: batches per step.
        train_mode: run the training step too.

    Raises:
        MisconfigurationException: a target does not exist or was not called.
        TracingError: no step could be run.
    """
    modules = dict(pl_module.named_modules())
    wanted = None if target == AUTO else [target] if isinstance(target, str) else list(target)
    for path in wanted or ():
        if path not in modules:
            near = near_names(path, [name for name in modules if name])
            hint = f" Near names: {', '.join(near)}." if near else ""
            raise MisconfigurationException(f"target: {type(pl_module).__name__} has no submodule {path!r}.{hint}")
    _check_disjoint(wanted or [])
    stages = _stages(trainer, train_mode)
    data = _Batches(trainer, pl_module, batches)
    for stage in stages:  # evaluation first, which leaves the statistics of a new batch norm alone
        if any(map(has_lazy_tensors, modules.values())):
            _run_all_steps(trainer, pl_module, data, (stage,), CallRecorder({}, []), most=1)
    seen = _run_all_steps(trainer, pl_module, data, stages, CallRecorder(modules, wanted))
    if wanted is None:
        found = seen.recorder.common_targets()

        def watch(flow: ModuleFlow) -> None:
            with flow.watching():
                _run_all_steps(trainer, pl_module, data, stages, CallRecorder(modules, found))

        wanted = parts_of_the_model(trainer, pl_module, found, seen.recorder, watch)
        warn_about_helpers(trainer, pl_module, wanted, seen.recorder, watch)
        if set(seen.recorder.calls) - set(found):  # some were called inside of others
            seen = _run_all_steps(trainer, pl_module, data, stages, CallRecorder(modules, wanted))
    recorder = seen.recorder
    calls = {path: recorder.calls[path] for path in wanted if path in recorder.calls}
    missing = [path for path in wanted if path not in calls]
    if calls and not missing:
        recorder.warn_about_float_stages(pl_module, wanted)
        return calls
    if seen.batches and missing and not seen.problems:
        called = ", ".join(repr(p) for paths in recorder.outermost.values() for p in paths) or "nothing"
        raise MisconfigurationException(
            f"target: {missing[0]!r} is not called by the steps of {type(pl_module).__name__} (they call {called}). "
            "Write one of these, or auto."
        )
    if seen.problems:
        why = "; ".join(seen.problems)
    elif seen.batches:
        why = "its steps call no submodule that has parameters and takes tensors"
    else:
        why = "the data loaders gave no batch (empty, or limit_*_batches leaves nothing of them)"
    raise TracingError(
        f"the ops of {type(pl_module).__name__} could not be traced: {why}. Set target: to the submodule to quantize, "
        "or define example_input_array."
    )


@dataclass
class _Seen:
    """What running the steps showed."""

    recorder: CallRecorder
    batches: int = 0
    problems: list[str] = field(default_factory=list)


def _stages(trainer: pl.Trainer, train_mode: bool) -> tuple[str, ...]:
    """The steps of this run; in a fit those of training too, before predictions those that calibration will run."""
    running = _compat.running_function(trainer)
    if running == "predict":
        return "calibration", "predict"
    return ("validate", "train")[: 1 + train_mode] if running == "train" else (running,)


def _run_all_steps(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    data: _Batches,
    stages: tuple[str, ...],
    recorder: CallRecorder,
    most: int | None = None,
) -> _Seen:
    """Run batches of each stage, at most so many, and of those that calibration will run: they may be larger."""
    seen = _Seen(recorder)
    with undisturbed(trainer, pl_module, trains=True), recorder.recording():
        for stage in stages:
            recorder.stage = stage
            count, problems = _run_steps(trainer, pl_module, stage, data, recorder, most)
            seen.batches += count
            seen.problems += problems
        if listed(trainer, ScaleSource) and "calibration" not in map(data.source, stages):
            recorder.decides = False
            _run_steps(trainer, pl_module, "calibration", data, recorder, most)
            recorder.decides = True
    if not recorder.calls and pl_module.example_input_array is not None:
        recorder.stage = "example"
        with undisturbed(trainer, pl_module), recorder.recording(), torch.no_grad():
            example = Call.of(_compat.transferred_example(pl_module))
            pl_module.eval()
            pl_module(*example.args, **example.kwargs)
    return seen


def _run_steps(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    stage: str,
    data: _Batches,
    recorder: CallRecorder,
    most: int | None,
) -> tuple[int, list[str]]:
    """Run one kind of step; it may fail once the targets were called (losses may need what is not there yet).

    Returns:
        The number of batches there were, and what went wrong.
    """
    if stage == "train" and not _compat.is_overridden("training_step", pl_module):
        return 0, []
    before = recorder.total
    taken = 0
    try:
        for extra in data.of(stage)[:most]:
            taken += 1
            pl_module.train(stage == "train")
            with torch.no_grad():
                output = run_step(trainer, pl_module, extra, "validate" if stage == "calibration" else stage)
            if stage == "train":
                recorder.gradient_leaves |= gradient_leaves(output)
    except MisconfigurationException as error:
        return taken, [str(error)]
    except Exception as error:
        if recorder.total == before and _compat.lacks_optimizers(trainer):  # it may have looked at them
            with suppress(Exception), _compat.stand_in_optimizers(trainer, pl_module):
                return _run_steps(trainer, pl_module, stage, data, recorder, most)
        if recorder.total > before:
            rank_zero_debug(f"{stage} step stopped after its forward while tracing: {error!r}")
            return taken, []
        hooks = _compat.start_hooks(trainer, pl_module)
        late = f" (it was run without its own {' and '.join(hooks)}, and with it)" if hooks else ""
        return taken, [f"its {stage} step failed with {type(error).__name__}: {error}{late}"]
    return taken, []


class _Batches:
    """The batches for tracing. Each loader gives them only once: batches taken from a stream are missing in the run.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        limit: batches per stage.

    Attributes:
        taken: the batches by the stage whose loader they come from.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, limit: int) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.limit = limit
        self.taken: dict[str, list[ExtraBatch]] = {}

    def source(self, stage: str) -> Stage:
        """Return whose loader gives the batches of a stage."""
        try:
            attached = stage != "calibration" and _compat.attached_loader(self.trainer, stage) is not None
        except Exception:  # a hook that needs a setup() of another stage
            attached = False
        return cast(Stage, stage) if attached else "calibration"

    def of(self, stage: str) -> list[ExtraBatch]:
        """Return the batches of a stage; a run that has no loader for it uses what it calibrates with."""
        source = self.source(stage)
        if source == "calibration" and "train" in self.taken and calibration_owner(self.trainer) is None:
            return self.taken["train"]
        if source not in self.taken:
            self.taken[source] = list(extra_batches(self.trainer, self.pl_module, self.limit, source))
        return self.taken[source]


def _check_disjoint(paths: list[str]) -> None:
    for outer in paths:
        for inner in paths:
            if inner != outer and (outer == "" or inner.startswith(outer + ".")):
                raise MisconfigurationException(
                    f"target: {inner!r} lies inside {outer or 'the whole module'!r}. Name disjoint submodules."
                )
