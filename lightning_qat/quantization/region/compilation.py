"""Running the forward of a region as code that ``torch.compile`` makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_qat.quantization.interception.interception import CapturedForward


class Compilation:
    """Compiles the forward of a region at its first use, once for train and once for eval mode.

    Args:
        options: arguments of ``torch.compile``, such as ``mode`` and ``dynamic``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {"fullgraph": True, **options}  # where a graph breaks, nobody knows the positions of the ops
        self._compiled: CapturedForward | None = None

    def run(self, captured: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the compiled forward.

        Args:
            captured: the forward as it is to be captured.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        if self._compiled is None:
            self._compiled = torch.compile(captured, **self.options)
        return self._compiled(args, kwargs)
