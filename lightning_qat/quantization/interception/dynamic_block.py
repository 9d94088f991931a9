"""Annotation for code whose repetition varies from batch to batch."""

from __future__ import annotations

import contextlib
import sys
from types import FrameType

import torch
from torch import nn

from lightning_qat.quantization.interception.interception import active_mode
from lightning_qat.quantization.interception.op_identity import OpIdentity


class dynamic_block:
    """Mark code whose repetition varies from batch to batch.

    Ops inside are identified by the label and their place in the block, not by how often the block ran. So every
    repetition uses the same quantizers, and ops inside can be fused. Outside a quantized forward it does nothing.

    Args:
        module: the module the block belongs to (``self``).
        name: label, unique within the module.

    Example:
        >>> import torch
        >>> with dynamic_block(torch.nn.Identity(), "cameras"):
        ...     y = torch.ones(2) + 1
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._entered: list[tuple[OpIdentity, FrameType] | None] = []

    def __enter__(self) -> None:
        # under torch.compile, ops are identified by their position, and a loop has as many rounds as in eager mode
        mode = None if torch.compiler.is_dynamo_compiling() else active_mode()
        if mode is None:
            self._entered.append(None)
            return
        frame = _with_statement(sys._getframe(1))
        mode.identity.enter_label(frame, self._module, self._name)
        self._entered.append((mode.identity, frame))

    def __exit__(self, *_: object) -> None:
        entered = self._entered.pop()
        if entered is not None:
            identity, frame = entered
            identity.exit_label(frame)


def _with_statement(frame: FrameType) -> FrameType:
    """Find the frame whose ops are marked: behind an ExitStack, or a generator-based context manager of the user."""
    while frame.f_back is not None:
        if contextlib.__file__ not in (frame.f_code.co_filename, frame.f_back.f_code.co_filename):
            break
        frame = frame.f_back
    return frame
