"""The protocol that identifies the ops of a running region: the part of interception that can be exchanged.

Eager mode identifies ops by their call path (:class:`~lightning_qat.quantization.interception.call_stack.CallStack`).
"""

from __future__ import annotations

from types import FrameType
from typing import Any, Protocol

from torch import nn


class OpIdentity(Protocol):
    """Identifies the ops of one entry of a region. Fresh per entry, so nothing survives an exception.

    A *scope* is a place inside the region that can be entered again, for a repetition in the backward. Each
    implementation has its own type for it.
    """

    @property
    def owner(self) -> object:
        """The object that all entries of one region share."""

    @property
    def target(self) -> nn.Module:
        """The module whose forward is the region."""

    def op(self, frame: FrameType, kind: str) -> Any:
        """Return the object that stands for the op of a kind that is called in a frame. This runs at every op.

        Return None inside a custom ``autograd.Function``: its ops do not belong to the region.
        """

    def enter_label(self, frame: FrameType, module: nn.Module, label: str) -> None:
        """Start a dynamic block of a module in a frame."""

    def exit_label(self, frame: FrameType) -> None:
        """End the innermost dynamic block of a frame."""

    def inner_scope(self, frame: FrameType, name: str) -> Any:
        """Return the scope of a function that a frame is about to call under another name, None outside the region."""

    def enter(self, frame: FrameType, scope: Any) -> None:
        """Let a frame run as a scope."""

    def resumed(self, frame: FrameType, scope: Any) -> OpIdentity:
        """Return the identity of another entry, which starts in a frame as a scope of this one."""

    def clear(self) -> None:
        """Release everything once the entry has ended."""
