"""Which modules that the steps call belong to the trained model, and which are only helpers of the training."""

from __future__ import annotations

from collections.abc import Callable, Collection

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
    flow = _flow_between(pl_module, candidates)
    watch(flow)
    taken = _taken(flow, candidates, idle)
    _tell(candidates, taken, set(candidates) - idle.keys(), idle)
    return [path for path in candidates if path in taken]


def warn_about_helpers(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    targets: list[str],
    recorder: CallRecorder,
    watch: Callable[[ModuleFlow], None],
) -> None:
    """Warn about helpers that a target calls itself, as its forward is quantized with all that it calls.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        targets: the paths that auto takes.
        recorder: has seen the steps.
        watch: runs the steps again, watched.
    """
    for target in targets:
        parts = _called_parts(pl_module, target, recorder)
        idle = _untrained(trainer, pl_module, parts, recorder)
        if not idle or len(idle) == len(parts):
            continue
        flow = _flow_between(pl_module, parts, pl_module.get_submodule(target))
        watch(flow)
        taken = _taken(flow, parts, idle)
        quantized = [path for path in parts if path in flow.inside and not recorder.called_only_in_training(path)]
        for path in (path for path in quantized if path not in taken):
            name = path.removeprefix(f"{target}.") if target else path
            rank_zero_warn(
                f"{path!r} is quantized, as {repr(target) if target else 'the whole module'} is the target and calls "
                f"it: {idle[path]}, and no part that is trained uses what it computes. If it is a teacher, a loss "
                f'network or an average of weights, keep it in float: overrides: [{{match: "{name}.*", activation: '
                f"{{dtype: float32}}, weight: {{dtype: float32}}}}]. If it is deployed, write target: {targets}, and "
                "this is not said again.",
                category=PossibleUserWarning,
            )


def _called_parts(pl_module: pl.LightningModule, target: str, recorder: CallRecorder) -> list[str]:
    """The modules with parameters that a target calls itself. Of a target that only calls one, that one's."""
    found: list[str] = []
    pending = [target]
    while pending:
        outer = pending.pop(0)
        for name, child in pl_module.get_submodule(outer).named_children():
            path = f"{outer}.{name}" if outer else name
            if any(True for _ in child.parameters()):
                (found if recorder.called(path) else pending).append(path)  # a ModuleList is not called
    return _called_parts(pl_module, found[0], recorder) if len(found) == 1 else found


def _flow_between(pl_module: pl.LightningModule, paths: list[str], around: nn.Module | None = None) -> ModuleFlow:
    inside = {id(p) for path in paths for p in pl_module.get_submodule(path).parameters()}
    return ModuleFlow(
        {path: pl_module.get_submodule(path) for path in paths},
        {id(p) for p in pl_module.parameters() if p.requires_grad and id(p) not in inside},
        around,
    )


def _taken(flow: ModuleFlow, paths: list[str], idle: Collection[str]) -> set[str]:
    """What is trained, and what works together with it."""
    taken = {path for path in paths if path not in idle}
    while found := {path for path in idle if path not in taken and _belongs(flow, path, taken)}:
        taken |= found
    return taken


def _belongs(flow: ModuleFlow, path: str, taken: set[str]) -> bool:
    """Whether a module works together with others. Assumed of a module of which no call was seen."""
    works = flow.reaches(path, {*taken, WEIGHTS}) or flow.continues(path, taken) or flow.joins(path, taken)
    return works or path not in flow.inputs


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
