"""Select the output of the region that an analysis looks at, and apply float post-processing to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.modules.tensor_leaves import is_float, named_leaves


@dataclass(frozen=True)
class OutputSelector:
    """Picks tensors from what a region returns.

    Args:
        output: path into the output such as ``map.layer_3`` or ``0.logits`` (keys, indices and fields, joined by dots),
            or a callable on the whole output. None: the whole output.
        post_process: function applied to the chosen output in float, such as ``torch.sigmoid``, if the metric of the
            model sees the values after it.

    Example:
        >>> import torch
        >>> select = OutputSelector("map.1", torch.sigmoid)
        >>> select({"map": [torch.ones(1), torch.zeros(1)]})
        [tensor([0.5000])]
    """

    output: str | Callable[[Any], Any] | None = None
    post_process: Callable[[Any], Any] | None = None

    def __call__(self, region_output: Any) -> list[Tensor]:
        """Return the chosen floating-point tensors; other tensors (indices, masks) only if nothing else was chosen.

        Raises:
            ConfigurationError: there is no such path, or no tensor at it.
        """
        return [tensor.detach() for tensor in self.differentiable(region_output)]

    def differentiable(self, region_output: Any) -> list[Tensor]:
        """Return the same tensors with their autograd graph.

        Raises:
            ConfigurationError: there is no such path, or no tensor at it.
        """
        chosen = self.chosen(region_output)
        tensors = [tensor for _, tensor in named_leaves(chosen)]
        if not tensors:
            raise ConfigurationError(
                f"{self.description} holds no tensor, but {type(chosen).__name__}. {_choices(region_output)}"
            )
        return [t for t in tensors if is_float(t)] or tensors

    def chosen(self, region_output: Any) -> Any:
        """Return the chosen part unchanged: a tensor, or a container of several.

        Raises:
            ConfigurationError: there is no such path.
        """
        chosen = region_output
        if callable(self.output):
            chosen = self.output(region_output)
        elif self.output:
            chosen = _at(region_output, self.output, region_output, self.output)
        return self.post_process(chosen) if self.post_process is not None else chosen

    @property
    def description(self) -> str:
        """Say in a few words what is chosen."""
        if callable(self.output):
            chosen = f"output {_name(self.output)}"
        else:
            chosen = f"output {self.output!r}" if self.output else "the whole output"
        return f"{chosen} after {_name(self.post_process)}" if self.post_process is not None else chosen


def _at(value: Any, path: str, whole: Any, full_path: str) -> Any:
    if not path:
        return value
    for name, child in _children(value):
        if path == name:
            return child
        if path.startswith(f"{name}."):
            return _at(child, path[len(name) + 1 :], whole, full_path)
    paths = [p for p, _ in named_leaves(whole) if p]
    near = near_names(full_path, paths)
    hint = f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
    raise ConfigurationError(f"the region has no output {full_path!r}.{hint} {_choices(whole)}")


def _children(value: Any) -> list[tuple[str, Any]]:
    """Named parts of a container, longest names first: a key may itself contain dots."""
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        parts = [(str(index), item) for index, item in enumerate(value)]
        parts += [(name, getattr(value, name)) for name in getattr(value, "_fields", ())]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        parts = []
    return sorted(parts, key=lambda part: -len(part[0]))


def _choices(whole: Any) -> str:
    paths = [path for path, _ in named_leaves(whole)]
    if paths == [""]:
        return "The output is a single tensor: leave `output` out."
    if not paths:
        return f"The region returns {type(whole).__name__}, in which no tensor was found: pass a callable."
    return f"Outputs: {', '.join(paths)}."


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
