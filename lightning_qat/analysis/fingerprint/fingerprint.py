"""The fingerprint of a training pipeline: everything that has to be the same in the float run and in QAT."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lightning_qat.analysis.fingerprint.layer_calls import LayerCall
from lightning_qat.analysis.fingerprint.module_settings import ModuleSettings, plain_modules
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummary
from lightning_qat.analysis.fingerprint.training_plan import TrainingPlan
from lightning_qat.quantization.errors import shown
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.reading.checks import AT_LEAST_ZERO, SHARE, Check
from lightning_qat.quantization.reading.files import Document
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as

FINGERPRINT_VERSION = 2
_READABLE = (1, 2)
"""Version 1 has no ``modules``, ``layers``, ``untrained`` and ``plan``."""
_NUMPY_HAS = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
_ALWAYS_WRITTEN = ("data", "model_inputs", "losses", "metrics", "standard_errors")
"""Without these there would be nothing to compare."""


def _has_groups(optimizer: dict[str, Any]) -> bool:
    groups = optimizer.get("groups", [])
    return isinstance(groups, list) and all(isinstance(group, dict) for group in groups)


_WITH_GROUPS = Check(_has_groups, "a mapping with a list of groups, each a mapping")


@dataclass(frozen=True)
class Fingerprint:
    """A small description of a float pipeline, as plain data.

    Args:
        data: what the loaders deliver, by stage (``train``, ``validate``).
        model_inputs: what the outermost modules receive in the steps, by stage; after any preprocessing in the step.
        losses: training loss of the first batches, with batch norm in ``eval`` and in ``train`` mode.
        metrics: what validation logs over the first batches.
        standard_errors: how much these vary over batches.
        modes: submodules that do not run in the module's own mode while training, by kind: ``{"eval": [...]}``.
        batch_norm: per batch norm: momentum, and mean of its running mean and variance.
        optimizers: class and settings of the groups of every optimizer.
        schedulers: class and interval of every scheduler.
        settings: precision, batch size, accumulation, clipping, seed, ...
        datasets: representation of dataset and transforms by stage.
        weights: digest of the parameters and buffers of every module that owns some.
        versions: of Python and packages.
        agreement: by stage and pair of tensors, ``output=target``: the share of integer targets that are where the
            model's output is largest; it shows labels that belong to other inputs. Batch norm and dropout are in eval
            mode for it, so that it is about the labels alone.
        constant_guess: the same for the best answer that does not look at the input: the most frequent class.
        random_evaluation: the same batch, evaluated twice, gave different results from the same model inputs.
        swapped: modules whose weights are replaced while validation runs, such as by averages that are swapped in.
        modules: what every module is beside its weights; None in files of earlier releases.
        layers: by stage what the modules compute in the first step, in the order in which their calls begin. Batch norm
            and dropout are in eval mode for it, and modules whose results are random are left out. None in files of
            earlier releases.
        untrained: parameters that training does not update: frozen, or in no optimizer. None if that is not known.
        sizes: number of values of every parameter; None in files of earlier releases.
        plan: how far the training can move the model, by its steps, schedules and optimizers; None if it is not known.
        batches: batches per stage and rank that were looked at.
        version: of this format.
    """

    data: dict[str, tuple[TensorSummary, ...]] = field(default_factory=dict)
    model_inputs: dict[str, tuple[TensorSummary, ...]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    standard_errors: dict[str, Annotated[float, AT_LEAST_ZERO]] = field(default_factory=dict)
    modes: dict[str, list[str]] = field(default_factory=dict)
    batch_norm: dict[str, dict[str, float]] = field(default_factory=dict)
    optimizers: list[Annotated[dict[str, Any], _WITH_GROUPS]] = field(default_factory=list)
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, dict[str, Annotated[float, SHARE]]] = field(default_factory=dict)
    constant_guess: dict[str, dict[str, float]] = field(default_factory=dict)
    random_evaluation: bool = False
    swapped: list[str] = field(default_factory=list)
    modules: dict[str, ModuleSettings] | None = None
    layers: dict[str, tuple[LayerCall, ...]] | None = None
    untrained: list[str] | None = None
    sizes: dict[str, Annotated[int, AT_LEAST_ZERO]] | None = None
    plan: TrainingPlan | None = None
    batches: int = 0
    version: int = FINGERPRINT_VERSION

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Fingerprint:
        """Read a fingerprint.

        Raises:
            DamagedFileError: there is no such file, or it is something else.
        """
        document = Document(
            path,
            "a fingerprint",
            "make it in the float project with `python -m lightning_qat fingerprint train.py --config float.yaml "
            "--ckpt_path float.ckpt`",
        )
        data = document.json()
        if not isinstance(data, dict) or "weights" not in data:
            raise document.error("it has no weights")
        if data.get("version") not in _READABLE:
            raise document.error(
                f"it is one of version {shown(data.get('version'))}, and this release reads versions up to "
                f"{FINGERPRINT_VERSION}"
            )
        with document.checked():
            for name in _ALWAYS_WRITTEN:
                if name not in data:
                    raise UnreadableValueError("is missing", name)
            return read_as(cls, data)


def weight_digests(module: nn.Module) -> dict[str, str]:
    """Return a digest of the own parameters and buffers of every submodule that has some; fake-quants are left out.

    Counters of batches are left out too: they count steps and hold nothing that was learned.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> weight_digests(one)[""] == weight_digests(other)[""]
        False
    """
    digests = {}
    for name, child in plain_modules(module):
        own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        own = [(key, tensor) for key, tensor in own if key != "num_batches_tracked"]
        if own:
            digests[name] = tensor_digest(own)
    return digests


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of names, shapes, types and bits of tensors.

    Example:
        >>> zero, negative_zero = torch.zeros(2), -torch.zeros(2)
        >>> tensor_digest([("a", zero)]) == tensor_digest([("a", negative_zero)])
        False
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode("utf-8", "surrogatepass"))
        if tensor.numel():
            content = tensor.detach().cpu().contiguous()
            if content.dtype not in _NUMPY_HAS:
                content = content.reshape(-1).view(torch.uint8)
            digest.update(content.numpy().data)
    return digest.hexdigest()[:16]


def batch_norm_summary(module: nn.Module) -> dict[str, dict[str, float]]:
    """Summarize the running statistics of every batch norm."""
    return {
        name: {
            "momentum": float(norm.momentum if norm.momentum is not None else 0.0),
            "running_mean": float(norm.running_mean.double().mean()),
            "running_var": float(norm.running_var.double().mean()),
        }
        for name, norm in plain_modules(module)
        if is_batch_norm(norm) and norm.running_mean is not None and norm.running_var is not None
    }


def deviating_modes(module: nn.Module) -> dict[str, list[str]]:
    """Return the submodules whose train/eval flag differs from that of the module itself."""
    found: dict[str, list[str]] = {}
    for name, child in plain_modules(module):
        if child.training != module.training:
            found.setdefault("train" if child.training else "eval", []).append(name)
    return found
