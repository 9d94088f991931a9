"""Run steps inside ``configure_model`` as training runs them: without the modes in which Lightning builds layers.

Around ``configure_model`` Lightning enters a default device and ``_EmptyInit``. Both see every call of torch functions,
so that tracing thousands of ops takes three times as long. A step of training has no such default device either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.init import _EmptyInit
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode  # type: ignore[attr-defined]
from torch.utils._device import DeviceContext


@contextmanager
def without_init_modes(device: torch.device) -> Iterator[None]:
    """Run a block without Lightning's modes. Modes that the user entered stay, such as a default device.

    Args:
        device: the root device of the strategy, which is the default device that Lightning enters.
    """
    active = [_pop_mode() for _ in range(_len_torch_function_stack())]  # the innermost first
    try:
        kept = _without_ours(active, device)
        for mode in reversed(kept):
            _push_mode(mode)
        try:
            yield
        finally:
            for _ in kept:
                _pop_mode()
    finally:
        for mode in reversed(active):
            _push_mode(mode)


def _without_ours(active: list[Any], device: torch.device) -> list[Any]:
    building = [mode for mode in active if isinstance(mode, _EmptyInit)]
    if not building:  # this is not within configure_model
        return active
    for mode in active:
        if isinstance(mode, DeviceContext) and mode.device == device and not _is_global(mode):
            before = getattr(mode, "prev_mode", None)  # what the user entered, in whose place it stands
            kept = [before if m is mode else m for m in active if m not in building]
            return [m for m in kept if m is not None]
    return [mode for mode in active if mode not in building]


def _is_global(mode: DeviceContext) -> bool:
    """Whether it is that of ``torch.set_default_device``."""
    return getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None) is mode
