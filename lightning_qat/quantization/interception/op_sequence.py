"""The order in which the ops of a region run: their identity where call paths cannot be read, under ``torch.compile``.

Eager forwards write the order down. While a forward is captured, each op is compared with the recorded one at its
position: the kind of the op and the lines of code that lead to it. So a forward that runs other ops, or the same ones
in another order, is refused and never gets its neighbours' fake-quants.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._guards import TracingContext

from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.functions.function_lookup import is_interceptable, spec_of
from lightning_qat.quantization.interception.code_locations import is_installed, is_user_code, shown_file
from lightning_qat.quantization.interception.interception import decomposed

F = TypeVar("F", bound=Callable[..., Any])
NO_OP, COMPOSITE, UNKNOWN = -1, -2, -3
_MOST_SEQUENCES = 8
"""In one mode. Each is compiled by itself."""
_MHA = "multi_head_attention_forward"
Calls = tuple[tuple[str, int, str], ...]
"""File, line and function in each frame of the user's code, from the op outwards.

The lines of installed code do not count, except for that of the op: decorators there may do something else under
``torch.compile``.
"""


def _at_capture(method: F) -> F:
    """Run a method in Python while a forward is captured; its result is a constant of the graph."""
    return cast(F, torch._dynamo.assume_constant_result(method))


@dataclass(frozen=True)
class RecordedOp:
    """An op that ran.

    Args:
        kind: the canonical name of its torch function.
        calls: where it was called.
        quantizers: its fake-quants.
    """

    kind: str
    calls: Calls
    quantizers: Any

    def __str__(self) -> str:
        return f"{self.kind} at {shown_file(self.calls[0][0])}:{self.calls[0][1]}" if self.calls else self.kind


class OpSequences:
    """The sequences of a region: those that eager forwards ran in train mode, and those in eval mode.

    There are several in a mode if what runs depends on the arguments. While a forward is captured, those remain whose
    ops agree so far.

    Args:
        target_type: class name of the module whose forward is quantized.

    Attributes:
        varying: an op of the forward that was one too many; empty if the forwards repeat.
        problem: why a forward that was captured is unknown; empty if none was.
    """

    def __init__(self, target_type: str) -> None:
        self.target_type = target_type
        self.varying = self.problem = ""
        # an eager forward has passed the checks already
        self.composites = {_MHA: decomposed(nn.functional.multi_head_attention_forward, unchecked=True)}
        self._known: dict[bool, list[tuple[RecordedOp, ...]]] = {False: [], True: []}
        self._captured: RecordedOp | None = None
        self._agreeing: dict[int, list[int]] = {}  # by the number of ops captured so far: the sequences that remain

    def of(self, training: bool) -> list[tuple[RecordedOp, ...]]:
        """Return the sequences of a mode; none before an eager forward in this mode, and if the order varies."""
        return [] if self.varying else self._known[training]

    def add(self, training: bool, ops: tuple[RecordedOp, ...]) -> bool:
        """Take the ops of a whole forward; return whether this sequence is new."""
        known = self._known[training]
        if ops in known:
            return False
        _show_all_functions()
        if len(known) == _MOST_SEQUENCES:
            pairs = itertools.zip_longest(ops, known[0])
            self.varying = next(str(op or other) for op, other in pairs if op != other)
        known.append(ops)
        return True

    def recorder(self, training: bool, entry: FrameType, wanted: bool) -> SequenceRecorder | None:
        """Return what writes down a forward that begins; None if nothing has to be written down.

        Args:
            training: the mode of the target.
            entry: the frame in which the forward is entered.
            wanted: write it down also if a sequence is known.
        """
        return None if self.varying or (self._known[training] and not wanted) else SequenceRecorder(entry)

    @_at_capture
    def match(self, training: bool, position: int, func: Callable[..., Any]) -> int:
        """Return the number of a sequence whose op at a position is a function that is captured now.

        Args:
            training: the mode of the target.
            position: the number of ops that were captured before.
            func: the function.

        Returns:
            The number; :data:`UNKNOWN` if no eager forward has run this op here; :data:`NO_OP`; or :data:`COMPOSITE`
            for a function that is made of several ops.
        """
        spec = spec_of(func)
        if not is_interceptable(spec):
            return NO_OP
        if spec.role == "composite":
            return COMPOSITE
        found = self._captured = RecordedOp(spec.kind, _captured_calls(), None)
        agreeing = [
            number
            for number, op in self._candidates(training, position)
            if op is not None and op.kind == found.kind and op.calls == found.calls[: len(op.calls)]
        ]
        if not agreeing:
            return UNKNOWN
        self._agreeing[position + 1] = agreeing
        return agreeing[0]

    @_at_capture
    def refuse(self, training: bool, position: int) -> int:
        """Refuse the op that was captured last.

        Raises:
            PlanMismatchError: always.
        """
        raise self._mismatch(training, position, str(self._captured))

    @_at_capture
    def check_end(self, training: bool, position: int) -> int:
        """Refuse a captured forward that ended early; return the number of its ops.

        Raises:
            PlanMismatchError: in every eager forward, more ops ran.
        """
        if all(op is not None for _, op in self._candidates(training, position)):
            raise self._mismatch(training, position, "nothing more")
        return position

    def _candidates(self, training: bool, position: int) -> Iterator[tuple[int, RecordedOp | None]]:
        """The sequences that agree so far, each with its op at a position; None behind its last one."""
        known = self._known[training]
        for number in self._agreeing[position] if position else range(len(known)):
            yield number, known[number][position] if position < len(known[number]) else None

    def _mismatch(self, training: bool, position: int, found: str) -> PlanMismatchError:
        expected = {str(op or "nothing more") for _, op in self._candidates(training, position)}
        self.problem = (
            f"{self.target_type} cannot be compiled: while its forward was captured, {found} ran where "
            f"{' or '.join(sorted(expected))} ran in eager mode. Leave that part out of the target, or write "
            "compile: false."
        )
        return PlanMismatchError(self.problem)


class SequenceRecorder:
    """Writes down the ops of one eager forward.

    Args:
        entry: the frame in which the forward is entered.

    Attributes:
        ops: the ops so far.
    """

    def __init__(self, entry: FrameType) -> None:
        self._entry = entry
        self.ops: list[RecordedOp] = []

    def note(self, kind: str, quantizers: Any, frame: FrameType) -> None:
        """Note an op that has run in a frame and gave a floating-point result; others need no identity."""
        self.ops.append(RecordedOp(kind, _calls(frame, self._entry), quantizers))


@functools.cache
def _show_all_functions() -> None:
    """Have dynamo hand every function that can carry quantizers to modes, as eager mode does.

    It hands over those of :func:`torch.overrides.get_overridable_functions`, which lacks ``torch.relu_``,
    ``F.hardswish`` and many more, and the function behind ``F.pad``. Where no mode is active, nothing changes.
    """
    shown = torch._dynamo.variables.torch.get_overridable_functions()
    for namespace in (torch, nn.functional, torch._C._nn):
        found = [getattr(namespace, name) for name in dir(namespace)]
        functions = (f for f in found if isinstance(f, types.FunctionType | types.BuiltinFunctionType))
        shown.update(f for f in functions if is_interceptable(spec_of(f)))


def _calls(frame: FrameType | None, entry: FrameType | None) -> Calls:
    found = []
    while frame is not None and frame is not entry:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return _calls_of_user(found)


def _captured_calls() -> Calls:
    """The calls of a forward that is captured now."""
    return _calls_of_user((f.filename, f.lineno or 0, f.name) for f in reversed(TracingContext.extract_stack()))


def _calls_of_user(frames: Iterable[tuple[str, int, str]]) -> Calls:
    own = [frame for frame in frames if is_user_code(frame[0])]
    return tuple(own[:1] + [(f, 0, name) if is_installed(f) else (f, line, name) for f, line, name in own[1:]])
