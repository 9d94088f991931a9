"""What the task measures where onnxruntime computes the quantized parts of a module."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_qat.callbacks.passes.evaluation import evaluate
from lightning_qat.callbacks.quantized_run import evaluations_of
from lightning_qat.export.capture import tensors_of
from lightning_qat.export.onnx_sessions import load
from lightning_qat.export.verification_result import TaskRow
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.preservation import replaced_attribute
from lightning_qat.quantization.region.region import Region


def exported_metrics(
    trainer: pl.Trainer, module: pl.LightningModule, regions: Mapping[str, Region], files: Mapping[str, Path]
) -> tuple[TaskRow, ...]:
    """Evaluate the validation data in float, with fake-quant, and with onnxruntime in the place of the regions.

    Args:
        trainer: the running trainer.
        module: its module.
        regions: by the path of their target.
        files: the exported file of each region, by the same path.

    Returns:
        One row per logged metric.

    Raises:
        ConfigurationError: a file cannot compute what the validation step gives the region.
    """
    shared = evaluations_of(trainer)
    in_float = shared.evaluate(trainer, module, "off").metrics
    fake_quant = shared.evaluate(trainer, module, "quantize").metrics
    with ExitStack() as stack:
        for path, region in regions.items():
            stack.enter_context(region.state("off"))
            stack.enter_context(_computed_by(files[path], region.target))
        exported = evaluate(trainer, module).metrics
    names = [name for name in in_float if name in fake_quant and name in exported]
    return tuple(TaskRow(name, in_float[name], fake_quant[name], exported[name]) for name in names)


def _computed_by(file: Path, target: nn.Module) -> AbstractContextManager[None]:
    """Let onnxruntime compute a module's forward inside the block, with all of its optimizations."""
    loaded = load(file)
    names = [value.name for value in loaded.get_inputs()]
    original = target.forward
    template: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = tensors_of((args, kwargs))
        if not template:
            template.append(original(*args, **kwargs))  # what is returned, besides tensors
        try:
            fed = {name: x.detach().cpu().numpy() for name, x in zip(names, given, strict=True)}
            found = iter(loaded.run(None, fed))
        except Exception as error:  # other shapes or other inputs than those of the example
            line = str(error).strip().splitlines()[0].rstrip(".")
            raise ConfigurationError(
                f"{file.name} does not take what the validation step gives it: {line}. If the last batch is smaller "
                "than the others, export with --dynamic-batch."
            ) from error
        device = given[0].device if given else "cpu"
        return tree_map(
            lambda leaf: torch.from_numpy(next(found)).to(device) if isinstance(leaf, Tensor) else leaf, template[0]
        )

    return replaced_attribute(target, "forward", forward)
