"""The arguments of one forward of a target: ``Call``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.modules.tensor_leaves import leaves


@dataclass(frozen=True)
class Call:
    """The arguments of one forward of the target.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
        modes: for a call that was recorded in a run: maps the name of each submodule (``""`` for the target) to
            whether it was in train mode. None for an example.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    modes: Mapping[str, bool] | None = None

    @property
    def training(self) -> bool | None:
        """Whether the call was made in train mode; None if that is not known."""
        return None if self.modes is None else self.modes[""]

    @classmethod
    def of(cls, batch: Any) -> Call:
        """Return a Call from a Call, a tensor, a tuple or list of args, a mapping of kwargs, or ``(args, kwargs)``."""
        if isinstance(batch, Call):
            return batch
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        if isinstance(batch, (tuple, list)):
            if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping):
                return cls(tuple(batch[0]), dict(batch[1]))
            return cls(tuple(batch))
        return cls((batch,))

    def copied(self) -> Call:
        """Return a call with the same tensors and modules whose other arguments are copies, where they can be copied.

        Objects that keep state between forwards, such as the key-value cache of a language model, are copied. So a
        call can run several times, and the caller's objects stay as they are.
        """
        return Call(_copied(self.args), _copied(self.kwargs), self.modes)

    def run(self, target: Callable[..., Any]) -> Any:
        """Return what the target returns for the arguments of this call, as :meth:`copied` copies them.

        A target that the user has compiled runs as it is written: tracing, calibration and analyses look inside.
        """
        own = self.copied()
        with torch.compiler.set_stance("force_eager"):
            return target(*own.args, **own.kwargs)


def _copied(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (Tensor, nn.Module)) or callable(value) or not hasattr(value, "__dict__"):
        return value
    try:
        return copy.deepcopy(value, {id(tensor): tensor for tensor in leaves(value)})
    except Exception:  # such as tensors with a gradient history: use the original
        return value
