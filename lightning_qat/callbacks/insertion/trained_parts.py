"""Which modules that the steps call belong to the trained model, and which are only helpers of the training."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn

from lightning_qat.callbacks.insertion.call_recorder import CallRecorder
from lightning_qat.callbacks.insertion.module_flow import WEIGHTS, ModuleFlow
from lightning_qat.callbacks.passes.run_step import loss_of
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn


def parts_of_the_model(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    candidates: list[str],
    recorder: CallRecorder,
    watch: Callable[[ModuleFlow], None],
) -> list[str]:
    """Leave out helpers that are not trained: a teacher, a loss network, an average of the weights.

    Kept are trained modules, modules that feed them (a frozen backbone, an embedding), and modules that use only their
    results (a frozen decoder). If nothing is trained, nothing is left out.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        candidates: paths of the modules that the steps call.
        recorder: has seen the steps.
        watch: runs the steps again, watched.
    """
    idle = _untrained(trainer, pl_module, candidates, recorder) if len(candidates) > 1 else {}
    if not idle or len(idle) == len(candidates):
        return candidates
    inside = {id(p) for path in candidates for p in pl_module.get_submodule(path).parameters()}
    flow = ModuleFlow(
        {path: pl_module.get_submodule(path) for path in candidates},
        {id(p) for p in pl_module.parameters() if p.requires_grad and id(p) not in inside},
    )
    watch(flow)
    taken = {path for path in candidates if path not in idle}
    trained = set(taken)
    while True:
        found = {path for path in idle if path not in taken and _belongs(flow, path, taken)}
        if not found:
            break
        taken |= found
    _tell(candidates, taken, trained, idle)
    return [path for path in candidates if path in taken]


def _belongs(flow: ModuleFlow, path: str, taken: set[str]) -> bool:
    """Whether a module works together with others. Assumed of a module of which no call was seen."""
    return flow.reaches(path, {*taken, WEIGHTS}) or flow.continues(path, taken) or path not in flow.inputs


def gradient_leaves(output: object) -> set[int]:
    """Return the identities of the parameters that the loss which a training step returned would have gradients for."""
    loss = loss_of(output)
    if loss is None or loss.grad_fn is None:
        return set()
    found: set[int] = set()
    seen, pending = {loss.grad_fn}, [loss.grad_fn]
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        pending += following
    return found


def _untrained(
    trainer: pl.Trainer, pl_module: pl.LightningModule, candidates: list[str], recorder: CallRecorder
) -> dict[str, str]:
    """Return the paths of modules that are not trained, each with the reason."""
    found: dict[str, str] = {}
    optimized: set[int] | None = None
    for path in candidates:
        module: nn.Module = pl_module.get_submodule(path)
        parameters = {id(p) for p in module.parameters() if p.requires_grad}
        if not parameters:
            found[path] = "none of its parameters requires a gradient"
        elif recorder.runs_without_gradients(path):
            found[path] = "training calls it under no_grad"
        elif recorder.called_in_training(path) and not parameters & recorder.gradient_leaves:
            optimized = _compat.optimized_parameters(trainer, pl_module) if optimized is None else optimized
            if optimized and not parameters & optimized:
                found[path] = "none of its parameters is in an optimizer"
    return found


def _tell(candidates: list[str], taken: set[str], trained: set[str], idle: dict[str, str]) -> None:
    kept = [path for path in candidates if path in taken]
    for path in candidates:
        if path not in taken:
            rank_zero_warn(
                f"target: auto leaves {path!r} out, which stays float: {idle[path]}, and no part that is trained uses "
                "what it computes. So it is taken for a teacher, a loss network or an average of weights. If it is "
                f"deployed, write target: {[*kept, path]}; else write target: {kept}, and this is not said again.",
                category=PossibleUserWarning,
            )
        elif path not in trained:
            others = [other for other in candidates if other in trained]
            rank_zero_info(
                f"QuantizationAwareTraining: auto takes {path!r} too, which is not trained ({idle[path]}), as it works "
                f"together with what is. If it only serves a loss, write target: {others}."
            )
