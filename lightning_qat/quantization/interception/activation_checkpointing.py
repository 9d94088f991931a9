"""Keep fake-quant active when activation checkpointing repeats part of the forward in the backward.

The repetition happens outside the target's forward, where no mode is active. A reentrant checkpoint would then silently
compute the gradients of the float function, and a non-reentrant one would fail. So while a region runs, the two entry
points of ``torch.utils.checkpoint`` are wrapped: the repeated function runs in the same scope, with observers frozen.
In threads that run no region the wrappers do nothing.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint as torch_checkpoint

from lightning_qat.quantization.interception.interception import InterceptionMode, active_mode

_NAME = "checkpoint"


class RunningRegion:
    """Context manager around every entry of a region. It changes torch globally while any region runs.

    It wraps checkpointing, and it runs functions under ``torch.compile`` inside the region eagerly, because compiled
    code would bypass the mode. Entries are counted, so that threads and nesting do not interfere.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _entries: ClassVar[int] = 0
    _undo: ClassVar[ExitStack] = ExitStack()

    def __enter__(self) -> None:
        cls = RunningRegion
        with cls._lock:
            if cls._entries == 0:
                cls._undo = ExitStack()
                cls._undo.enter_context(_patched_checkpoint())
                cls._undo.enter_context(torch.compiler.set_stance("force_eager"))
            cls._entries += 1

    def __exit__(self, *_: object) -> None:
        cls = RunningRegion
        with cls._lock:
            cls._entries -= 1
            if cls._entries == 0:
                cls._undo.close()


@contextmanager
def _patched_checkpoint() -> Iterator[None]:
    reentrant = torch_checkpoint.CheckpointFunction
    non_reentrant = torch_checkpoint._checkpoint_without_reentrant_generator
    torch_checkpoint.CheckpointFunction = _Reentrant(reentrant)  # type: ignore[assignment, misc]
    torch_checkpoint._checkpoint_without_reentrant_generator = _non_reentrant(non_reentrant)
    try:
        yield
    finally:
        torch_checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]
        torch_checkpoint._checkpoint_without_reentrant_generator = non_reentrant


class _Reentrant:
    """Stands in for ``CheckpointFunction``: only ``apply`` is called on it."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        mode = active_mode()
        scope = mode.identity.inner_scope(sys._getframe(1), _NAME) if mode is not None else None
        if mode is not None and scope is not None:
            function = _Resumable(function, mode, scope)
            # nothing to recompute; torch would warn about that while tracing
            if mode.keeps_activations or not torch.is_grad_enabled():
                return function(*args[1:])
        return self._original.apply(function, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _non_reentrant(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode = active_mode()
        if mode is not None:
            frame = sys._getframe(1)  # torch's checkpoint(), which calls the function itself the first time
            scope = mode.identity.inner_scope(frame, _NAME)
            if scope is not None:
                mode.identity.enter(frame, scope)
                function = _Resumable(function, mode, scope)
            if mode.keeps_activations:
                return iter((None,))  # torch's checkpoint() runs the function between two steps of the generator
        return original(function, *args, **kwargs)

    return generator


class _Resumable:
    """A checkpointed function: as part of the running region the first time, re-entering it when repeated."""

    def __init__(self, function: Callable[..., Any], mode: InterceptionMode, scope: Any) -> None:
        self._function = function
        self._mode = mode
        self._scope = scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame: FrameType = sys._getframe()
        running = active_mode(self._mode.identity.owner)
        if running is not None:
            running.identity.enter(frame, self._scope)
            return self._function(*args, **kwargs)
        resumed = self._mode.resumed(frame, self._scope)
        if resumed is None:
            return self._function(*args, **kwargs)
        try:
            with RunningRegion(), resumed:
                return self._function(*args, **kwargs)
        finally:
            resumed.identity.clear()
