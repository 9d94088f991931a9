"""Finding out what a step passes to which module: the targets, and the calls to trace them with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_debug  # type: ignore[attr-defined]
from torch import nn
from torchmetrics import Metric

from lightning_qat.callbacks import _compat
from lightning_qat.callbacks.extra_pass import ExtraBatch, analysis_batches, run_step, undisturbed
from lightning_qat.quantization.errors import TracingError, near_names
from lightning_qat.quantization.tensor_leaves import leaves
from lightning_qat.quantization.tracing import Call

AUTO = "auto"


def captured_calls(
    trainer: pl.Trainer, pl_module: pl.LightningModule, target: str | list[str], batches: int
) -> dict[str, list[Call]]:
    """Run a few steps and return the calls of each target, by path (``""`` is the module itself).

    Args:
        trainer: the running trainer.
        pl_module: the module whose steps run.
        target: ``auto``, a path, or several.
        batches: batches per step.

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
    recorder = _CallRecorder(modules, wanted)
    problems: list[str] = []
    with undisturbed(trainer, pl_module), recorder.recording():
        for stage in ("validate", "train"):
            problems += _run_steps(trainer, pl_module, stage, batches, recorder)
    if not recorder.calls and pl_module.example_input_array is not None:
        with undisturbed(trainer, pl_module), recorder.recording(), torch.no_grad():
            example = Call.of(pl_module._apply_batch_transfer_handler(pl_module.example_input_array))
            pl_module.eval()
            pl_module(*example.args, **example.kwargs)
    chosen = recorder.outermost() if wanted is None else wanted
    calls = {path: recorder.calls[path] for path in chosen if path in recorder.calls}
    missing = [path for path in chosen if path not in calls]
    if calls and not missing:
        return calls
    if missing and not problems:
        called = ", ".join(repr(path) for path in recorder.outermost()) or "nothing"
        raise MisconfigurationException(
            f"target {missing[0]!r} is not called by the steps of {type(pl_module).__name__} (they call {called}); set "
            "target: to one of these."
        )
    why = "; ".join(problems) if problems else "its steps call no submodule with parameters"
    raise TracingError(
        f"the ops of {type(pl_module).__name__} could not be traced: {why}. Set target: to the submodule to quantize, or "
        "define example_input_array."
    )


def _run_steps(
    trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, batches: int, recorder: _CallRecorder
) -> list[str]:
    """Run one kind of step; it may fail once the targets were called (there are no optimizers yet, for example)."""
    if not _compat.is_overridden("validation_step" if stage == "validate" else "training_step", pl_module):
        return []
    before = recorder.total
    try:
        for extra in _batches(trainer, pl_module, stage, batches):
            pl_module.train(stage == "train")
            with torch.no_grad():
                run_step(trainer, pl_module, extra, "validate" if stage == "validate" else "train")
    except MisconfigurationException as error:
        return [str(error)]
    except Exception as error:
        if recorder.total > before:
            rank_zero_debug(f"{stage} step stopped after its forward while tracing: {error!r}")
            return []
        return [f"its {stage} step failed before any submodule was called ({type(error).__name__}: {error})"]
    return []


def _batches(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, batches: int) -> Iterator[ExtraBatch]:
    """Batches of a stage; a run that has no loader for it (validate alone) uses what it has."""
    if _compat.attached_loader(trainer, stage) is not None:
        return analysis_batches(trainer, pl_module, batches, stage)  # type: ignore[arg-type]
    return analysis_batches(trainer, pl_module, batches, "calibration")


class _CallRecorder:
    """Wraps the forward of every module while steps run, and keeps the arguments of outermost calls."""

    def __init__(self, modules: dict[str, nn.Module], wanted: list[str] | None) -> None:
        self._modules = modules
        self._wanted = wanted
        self._depth = 0
        self.calls: dict[str, list[Call]] = {}
        self.total = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        patched = []
        for path, module in self._modules.items():
            if isinstance(module, (Metric, torch.jit.ScriptModule)):
                continue
            patched.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = self._recording_forward(path, module)
        try:
            yield
        finally:
            self._depth = 0
            for module, previous in patched:
                if previous is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = previous

    def _recording_forward(self, path: str, module: nn.Module) -> Any:
        forward = module.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            outermost = self._depth == 0
            if (outermost and self._wanted is None) or (self._wanted is not None and path in self._wanted):
                self.calls.setdefault(path, []).append(Call(args, kwargs))
                self.total += 1
            self._depth += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self._depth -= 1

        return recorded

    def outermost(self) -> list[str]:
        """The module itself if a step called it, else the outermost submodules that hold parameters and take tensors."""
        if "" in self.calls:
            return [""]
        return [
            path
            for path, calls in self.calls.items()
            if any(True for _ in self._modules[path].parameters())
            and any(leaves((call.args, call.kwargs)) for call in calls)
        ]


def _check_disjoint(paths: list[str]) -> None:
    for outer in paths:
        for inner in paths:
            if inner != outer and (outer == "" or inner.startswith(outer + ".")):
                raise MisconfigurationException(
                    f"target: {inner!r} lies inside {outer or 'the whole module'!r}. Name disjoint submodules."
                )
