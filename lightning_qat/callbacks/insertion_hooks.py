"""Inserting fake-quant at the one moment that works: after the layers exist, before weights are loaded.

``Callback.setup`` is too early for layers built in ``configure_model``, and no callback hook follows it. So the module gets
an instance-level ``configure_model`` that calls the original and inserts, and an instance-level ``on_load_checkpoint`` that
looks at the checkpoint before it is loaded; both are taken off in teardown.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_qat.callbacks.extra_pass import misconfiguration
from lightning_qat.callbacks.float_checkpoint import stored_regions
from lightning_qat.callbacks.target_discovery import captured_calls
from lightning_qat.quantization.errors import TracingError
from lightning_qat.quantization.insertion import attach
from lightning_qat.quantization.op_graph import OpGraph
from lightning_qat.quantization.plan import make_plan
from lightning_qat.quantization.region import find_regions, read_extra_state
from lightning_qat.quantization.tracing import trace

if TYPE_CHECKING:
    from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining

_HOOKS = ("configure_model", "on_load_checkpoint")


class InsertionHooks:
    """Owns the two instance-level hooks of one run.

    Args:
        callback: what to insert.
        trainer: the running trainer.
        pl_module: where to insert.
    """

    def __init__(self, callback: QuantizationAwareTraining, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.callback = callback
        self.trainer = trainer
        self.pl_module = pl_module
        self._before: dict[str, Any] = {}
        self._pending: MisconfigurationException | None = None

    def install(self) -> None:
        """Put the hooks on the module. Plain functions without ``__wrapped__``: Lightning looks behind wrappers."""
        original_configure, original_load = self.pl_module.configure_model, self.pl_module.on_load_checkpoint
        self._before = {name: self.pl_module.__dict__.get(name) for name in _HOOKS}

        def configure_model() -> None:
            original_configure()
            self.insert()

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            original_load(checkpoint)
            self.check_checkpoint(checkpoint)

        self.pl_module.__dict__["configure_model"] = configure_model
        self.pl_module.__dict__["on_load_checkpoint"] = on_load_checkpoint

    def uninstall(self) -> None:
        """Take the hooks off."""
        for name, previous in self._before.items():
            if previous is None:
                self.pl_module.__dict__.pop(name, None)
            else:
                self.pl_module.__dict__[name] = previous
        self._before = {}

    def raise_pending_error(self) -> None:
        """Raise the tracing error, if no checkpoint has brought a plan since."""
        if self._pending is not None:
            raise self._pending

    def insert(self) -> None:
        """Load the initial weights, learn the ops and insert; a module that has fake-quants keeps them."""
        if find_regions(self.pl_module):
            return
        self.callback.load_initial_weights(self.pl_module)
        try:
            graphs = self._traced()
        except TracingError as error:
            # a checkpoint may still bring a plan
            self._pending = MisconfigurationException(str(error))
            self._pending.__cause__ = error
            return
        graphs = self._agreed(graphs)
        with misconfiguration():
            plans = _plans(graphs, self.callback)
            for path, graph in graphs.items():
                attach(_submodule(self.pl_module, path), graph, plans[path])

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look at a checkpoint before its weights are loaded; without a trace, its plan is inserted as it is."""
        stored = stored_regions(checkpoint["state_dict"])
        if not stored:
            raise MisconfigurationException(
                "ckpt_path is a float checkpoint, and QuantizationAwareTraining is in the list of callbacks. To start QAT "
                'from it, write QuantizationAwareTraining(init_from="<that path>") and leave ckpt_path empty: weights are '
                "loaded, loops and optimizer start fresh."
            )
        regions = find_regions(self.pl_module)
        with misconfiguration():
            if self._pending is not None:
                for path, state in stored.items():
                    graph, plan = read_extra_state(state)
                    attach(_submodule(self.pl_module, path), graph, plan, traced=False)
                self._pending = None
            elif set(stored) != set(regions):
                raise MisconfigurationException(
                    f"the checkpoint has fake-quants on {_spelled(stored)}, this run puts them on {_spelled(regions)}: set "
                    f"target: {_spelled(stored)} in QuantizationAwareTraining."
                )
            for path, region in find_regions(self.pl_module).items():
                region.set_extra_state(stored[path])

    def _traced(self) -> dict[str, OpGraph]:
        """Trace the target(s) on what a few validation and training steps pass to them."""
        device = self.trainer.strategy.root_device
        with _on_device(self.pl_module, device), _quiet():
            calls = captured_calls(self.trainer, self.pl_module, self.callback.target, self.callback.trace_batches)
            return {path: trace(_submodule(self.pl_module, path), c) for path, c in calls.items()}

    def _agreed(self, graphs: dict[str, OpGraph]) -> dict[str, OpGraph]:
        """All ranks use rank 0's graph; they may have drawn different batches."""
        if self.trainer.world_size == 1:
            return graphs
        first = self.trainer.strategy.broadcast({path: graph.to_dict() for path, graph in graphs.items()})
        if set(first) != set(graphs):
            raise MisconfigurationException(f"ranks disagree about the targets: {_spelled(first)}, {_spelled(graphs)}.")
        return {path: OpGraph.from_dict(graph) for path, graph in first.items()}


def _plans(graphs: dict[str, OpGraph], callback: QuantizationAwareTraining) -> dict[str, Any]:
    """Plan all targets; an override has to match in at least one of them."""
    from lightning_qat.quantization.errors import ConfigurationError

    plans = {}
    overrides = callback.overrides
    if len(graphs) == 1:
        return {path: make_plan(graph, callback.qconfig, overrides) for path, graph in graphs.items()}
    for override in overrides:
        errors = []
        for graph in graphs.values():
            try:
                make_plan(graph, callback.qconfig, [override])
            except ConfigurationError as error:
                errors.append(error)
        if len(errors) == len(graphs):
            raise errors[0]
    for path, graph in graphs.items():
        fitting = []
        for override in overrides:
            try:
                make_plan(graph, callback.qconfig, [override])
            except ConfigurationError:
                continue
            fitting.append(override)
        plans[path] = make_plan(graph, callback.qconfig, fitting)
    return plans


@contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block with the module on the device it will train on (some kernels exist only there), and move it back."""
    before = next((t.device for t in module.parameters()), device)
    moved = before != device and before.type != "meta"
    if moved:
        module.to(device)
    try:
        yield
    finally:
        if moved:
            module.to(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing is not training: advice about it would only puzzle."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        yield


def _submodule(pl_module: pl.LightningModule, path: str) -> nn.Module:
    return pl_module.get_submodule(path) if path else pl_module


def _spelled(paths: Any) -> str:
    return "[" + ", ".join(repr(p) if p else "the whole module" for p in paths) + "]"
