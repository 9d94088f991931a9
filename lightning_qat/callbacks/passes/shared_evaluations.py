"""Evaluations of the present model, made once and shared by all callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_qat.analysis.fingerprint.fingerprint import tensor_digest
from lightning_qat.callbacks.passes.evaluation import Evaluation, evaluate
from lightning_qat.quantization.modules.module_walk import own_tensors
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.quantization.region.switches import State

T = TypeVar("T")
ModelKey = tuple[int, int, str, frozenset[str]]
"""Step, epoch, digest of the tensors, and the points whose scale is about to follow the weight: the same key, the same
model."""


def model_key(trainer: pl.Trainer, pl_module: pl.LightningModule) -> ModelKey:
    """Return the key of the model as it is now; it changes with every bit of a parameter, a buffer or a scale.

    The key does not cover other attributes that steps change: extra passes put those back.
    """
    outdated = (
        f"{path}:{name}"
        for path, region in find_regions(pl_module).items()
        for name, fake_quant in region.points.items()
        if fake_quant.outdated
    )
    return trainer.global_step, trainer.current_epoch, tensor_digest(own_tensors(pl_module)), frozenset(outdated)


class SharedEvaluations:
    """The evaluations of a model in one state of its weights; QuantizationAwareTraining keeps them for a trainer.

    A second request for the same model, state of the fake-quants, stage and number of batches gets the result of the
    first. Two limits that are both larger than the loader count as the same number of batches. If an evaluation draws
    random numbers, all callers get the result of the first draw.
    """

    def __init__(self) -> None:
        self._model: ModelKey | None = None
        self._known: dict[tuple[State, str, float], Evaluation] = {}
        self._measured: dict[str, Any] = {}

    def evaluate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        state: State,
        *,
        stage: str = "validate",
        limit: float = math.inf,
    ) -> Evaluation:
        """Evaluate the module with all its regions in one state and no scale moving. Call it on all ranks.

        Args:
            trainer: the running trainer.
            pl_module: its module, which is not changed.
            state: of the fake-quants.
            stage: see :func:`~lightning_qat.callbacks.passes.evaluation.evaluate`.
            limit: number of batches on this rank at most.

        Raises:
            MisconfigurationException: there is no data.
        """
        self._follow(trainer, pl_module)
        known = self._find(state, stage, limit)
        if trainer.strategy.reduce_boolean_decision(known is not None, all=True) and known is not None:
            return known
        with ExitStack() as stack:
            for region in find_regions(pl_module).values():
                stack.enter_context(region.state(state, updates=()))
            found = self._known[state, stage, limit] = evaluate(trainer, pl_module, stage=stage, limit=limit)
        return found

    def once(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, measure: Callable[[], T]) -> T:
        """Return something else that is measured on the model, such as what its data are like. Call it on all ranks.

        Args:
            trainer: the running trainer.
            pl_module: its module, which is not changed.
            name: of what is measured: a second request for the same model gets the result of the first.
            measure: measures it, on all ranks.
        """
        self._follow(trainer, pl_module)
        if not trainer.strategy.reduce_boolean_decision(name in self._measured, all=True):
            self._measured[name] = measure()
        found: T = self._measured[name]
        return found

    def _follow(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what is known of another model."""
        model = model_key(trainer, pl_module)
        if model != self._model:
            self._model, self._known, self._measured = model, {}, {}

    def _find(self, state: State, stage: str, limit: float) -> Evaluation | None:
        for (of_state, of_stage, of_limit), known in self._known.items():
            all_there_are = known.batches < of_limit and known.batches <= limit
            if (of_state, of_stage) == (state, stage) and (of_limit == limit or all_there_are):
                return known
        return None
