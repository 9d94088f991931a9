"""Capturing a quantized model with torch.export: what every exported form starts with."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lightning_qat.export.export_errors import capture_error
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.preservation import preserved_modes
from lightning_qat.quantization.region.region import Region, find_regions


def quantized_regions(model_or_region: nn.Module) -> tuple[nn.Module, dict[str, Region]]:
    """Return the model, and its regions by the paths of their targets.

    Raises:
        ConfigurationError: there is none.
    """
    if isinstance(model_or_region, Region):
        return model_or_region.target, {"": model_or_region}
    regions = find_regions(model_or_region)
    if not regions:
        raise ConfigurationError(
            f"{type(model_or_region).__name__} has no fake-quants, so there is no deployed form to export: quantize "
            "it first, by load_quantized(...) from the checkpoint of a QAT run or by insert(...) and calibrate(...)."
        )
    return model_or_region, regions


@contextmanager
def evaluating(model: nn.Module, regions: Mapping[str, Region]) -> Iterator[None]:
    """Quantize in eval mode for the duration of a block."""
    with ExitStack() as stack:
        for region in regions.values():
            region.scales.refresh_weights()
            stack.enter_context(region.state("quantize"))
        stack.enter_context(preserved_modes(model))
        model.eval()
        yield


def captured(model: nn.Module, call: Call, dynamic_shapes: Any) -> ExportedProgram:
    """Capture one forward of a model.

    Args:
        model: in the form in which it is exported.
        call: the example inputs.
        dynamic_shapes: as users write them.

    Raises:
        ConfigurationError: torch.export cannot follow the forward.
    """
    try:
        return torch.export.export(
            model, call.args, call.kwargs, dynamic_shapes=export_shapes(dynamic_shapes), strict=False
        )
    except ConfigurationError:
        raise
    except Exception as error:  # torch raises many kinds
        raise capture_error(model, error) from error


def export_shapes(given: Any) -> Any:
    """Return dynamic shapes as torch.export knows them: an axis that is given by its name is a dynamic one."""
    if isinstance(given, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(given, Mapping):
        return {key: export_shapes(value) for key, value in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(export_shapes(value) for value in given)
    return given


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in the order in which torch.export numbers them."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporter from warning about itself; what goes wrong is raised."""
    logger = logging.getLogger("torch")
    disabled = logger.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(disabled)
