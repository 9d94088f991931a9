"""Decide in which modes a target is traced with each call: a recorded call runs in the mode it was made in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_qat.quantization.modules.call import Call


@dataclass(frozen=True)
class Replay:
    """One forward to trace.

    Args:
        call: its arguments.
        training: True to run it in train mode, False for eval mode.
        as_made: the call was recorded in this mode, so that each submodule gets its recorded mode.
        required: a failure is an error. If False, the ops before a failure are traced.
    """

    call: Call
    training: bool
    as_made: bool
    required: bool

    def set_modes(self, target: nn.Module) -> None:
        """Set the modes of the target and its submodules to those of the call: parts of it may be in eval mode."""
        target.train(self.training)
        if self.as_made and self.call.modes is not None:
            for name, module in target.named_modules():
                module.training = self.call.modes.get(name, module.training)


def replays(calls: Sequence[Call], train_mode: bool) -> list[Replay]:
    """Decide which call runs in which mode, eval mode first.

    A recorded call is replayed in its own mode: another mode may need other arguments (targets only in training), and a
    batch of one sample has no batch statistics. Examples run in eval mode and are tried in train mode. If no call was
    made in a mode, the calls of the other mode are tried in it.

    Args:
        calls: recorded calls and examples.
        train_mode: True to trace train mode too. False runs every call in eval mode.

    Returns:
        The replays, at least two of each mode that has any: a tensor that two forwards meet is a constant.
    """
    if not train_mode:
        return _twice([Replay(call, False, call.training is False, True) for call in calls])
    modes: dict[bool, list[Replay]] = {
        training: [
            Replay(call, training, call.training is not None, call.training is not None or not training)
            for call in calls
            if call.training in (training, None)
        ]
        for training in (False, True)
    }
    for training, found in modes.items():
        if not found:
            modes[training] = [Replay(other.call, training, False, False) for other in modes[not training]]
    return [*_twice(modes[False]), *_twice(modes[True])]


def _twice(found: list[Replay]) -> list[Replay]:
    return found * 2 if len(found) == 1 else found
