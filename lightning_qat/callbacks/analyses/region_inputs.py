"""The inputs of the quantized regions in the module's own steps, for analyses that run the forwards again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import capture_calls
from lightning_qat.callbacks.passes.extra_batches import extra_batches
from lightning_qat.callbacks.passes.fresh_loaders import Stage
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.preservation.undisturbed import EVALUATION_HOOKS
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.tensor_leaves import leaves, map_call_leaves
from lightning_qat.quantization.region.region import Region

_KEPT_BYTES = 2**26
"""Batches of this size, together, may be kept from one analysis to the next."""

_HOOKS = (*EVALUATION_HOOKS, "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""With one of these in the module, what the regions get may depend on its weights."""

Calls = dict[str, list[Call]]
"""By the path of the region's target."""


class RegionInputs:
    """The inputs of the regions in the steps on some sampled batches: the same batches in every analysis of a run.

    The step has to run to find the inputs. If it hands the batch itself to all regions, training cannot change the
    inputs. A copy of them (at most 64 MiB) is then kept, and the next analysis needs neither a loader nor the step.

    Args:
        stage: whose batches.
    """

    def __init__(self, stage: Stage = "calibration") -> None:
        self._stage = stage
        self._kept: dict[int, Calls] = {}

    def are_kept(self, batches: int) -> bool:
        """Whether the inputs in this many batches are kept, so that no step has to run."""
        return batches in self._kept

    def of(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, regions: Mapping[str, Region], batches: int
    ) -> Calls:
        """Return the calls of every region. Call it on all ranks, within an ``undisturbed_analysis``.

        Args:
            trainer: the running trainer.
            pl_module: its module.
            regions: by the path of their target.
            batches: how many, per rank.
        """
        if batches in self._kept:
            return self._kept[batches]
        calls: Calls = {path: [] for path in regions}
        kept: dict[str, list[Call | None]] = {path: [] for path in regions}
        room = 0 if _depends_on_weights(trainer, pl_module) else _KEPT_BYTES
        for extra in extra_batches(trainer, pl_module, batches, self._stage):
            tensors = leaves(extra.batch)
            room -= sum(t.numel() * t.element_size() for t in tensors)
            copies = {id(t): t.detach().clone() for t in tensors} if room > 0 else {}
            captured = capture_calls(regions, partial(run_step, trainer, pl_module, extra))
            for path in regions:
                calls[path] += captured[path]
                kept[path] += [_of_copies(call, copies) for call in captured[path]] if room > 0 else ()
        # a target that these steps did not call may be called in later epochs
        is_constant = room > 0 and all(kept.values()) and None not in itertools.chain(*kept.values())
        if trainer.strategy.reduce_boolean_decision(is_constant, all=True):
            calls = {path: [call for call in found if call is not None] for path, found in kept.items()}
            self._kept[batches] = calls
        return calls


def _depends_on_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether later batches may differ: loaders are reloaded, or a hook of the module may use its weights."""
    reloaded = trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined]
    return reloaded or any(_compat.is_overridden(hook, pl_module) for hook in _HOOKS)


def _of_copies(call: Call, copies: dict[int, Tensor]) -> Call | None:
    """Return a call with copies of a batch's tensors; None if the call holds anything else that may change."""
    if not _is_plain((call.args, call.kwargs)):
        return None
    tensors = leaves((call.args, call.kwargs))
    if not all(id(t) in copies and torch.equal(t, copies[id(t)]) for t in tensors):
        return None
    return Call(*map_call_leaves(call.args, call.kwargs, lambda _, tensor: copies[id(tensor)]))


def _is_plain(value: Any) -> bool:
    """Whether a value consists of tensors and of constants that no step changes."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, str))
