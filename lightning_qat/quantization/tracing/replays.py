"""In which mode the calls that a target is traced with are run: each in the mode that it was made in."""

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
        training: run it in train mode, else in eval mode.
        as_made: the call was made in this mode, so that it runs in it.
        required: it has to run; else what it reaches is traced, and a failure is no error.
    """

    call: Call
    training: bool
    as_made: bool
    required: bool

    def set_modes(self, target: nn.Module) -> None:
        """Put a target into the modes of the call, those of its submodules too: parts of it may be in eval mode."""
        target.train(self.training)
        if self.as_made and self.call.modes is not None:
            for name, module in target.named_modules():
                module.training = self.call.modes.get(name, module.training)


def replays(calls: Sequence[Call], train_mode: bool) -> list[Replay]:
    """Decide which call runs in which mode, eval mode first.

    A call that was seen in a run is replayed as it was made: other arguments belong to another mode (targets only in
    training), and a batch of one sample has no batch statistics. Examples run in eval mode and are tried in train
    mode. A mode in which no call was made is tried with the calls of the other one.

    Args:
        calls: what was seen, and examples.
        train_mode: trace train mode too; else every call runs in eval mode.

    Returns:
        At least two of a mode, if there is one of it: constants are known by being met again.
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
