"""The switches of a region: its state, which of its scales follow the data, and the taps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor

from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.planning.plan import ScaleRole

State = Literal["off", "observe", "quantize"]
Tap = Callable[[str, Tensor, Tensor], None]


class Switches:
    """The switches of a region; :class:`~lightning_qat.quantization.region.region.Region` says what each one does.

    Attributes:
        state: ``off``, ``observe`` or ``quantize``.
        updates: which scales follow the data while quantizing in train mode.
        first_scales: whether points that began at zero take their scale from the data in train mode.
        taps: functions that are called at every quantization.
        eager: no compiled code runs, whoever compiles.
    """

    def __init__(self) -> None:
        self.state: State = "off"
        self.updates: frozenset[str] = frozenset({"weight"})
        self.first_scales = True
        self.taps: tuple[Tap, ...] = ()
        self.eager = False

    def set(self, state: State, updates: Iterable[ScaleRole] | None = None) -> None:
        """Set the state, and the updates if they are given.

        Raises:
            ConfigurationError: there is no such state or role.
        """
        if state not in get_args(State):
            raise unknown_choice("state", state, get_args(State))
        if updates is not None:
            updates = frozenset(updates)
            for update in updates:
                if update not in get_args(ScaleRole):
                    raise unknown_choice("role", update, get_args(ScaleRole))
            self.updates = updates
        self.state = state

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "taps": ()}  # a copy has no taps

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put state, updates and :attr:`eager` back at the end of a block, also after an exception."""
        before = self.state, self.updates, self.eager
        try:
            yield
        finally:
            self.state, self.updates, self.eager = before

    @contextmanager
    def tap(self, tap: Tap) -> Iterator[None]:
        """Call ``tap(point, float_value, quantized_value)`` at every quantization in the block."""
        before = self.taps
        self.taps = (*before, tap)
        try:
            yield
        finally:
            self.taps = before


@contextmanager
def only(points: Mapping[str, FakeQuantize], names: Iterable[str]) -> Iterator[None]:
    """Enable only the named points for the duration of a block.

    Raises:
        ConfigurationError: there is no point of that name.
    """
    chosen = set(names)
    for name in chosen:
        if name not in points:
            raise unknown_choice("point", name, points)
    enabled = {id(points[name]) for name in chosen}
    switched = [f for f in points.values() if f.enabled != (id(f) in enabled)]
    try:
        for fake_quant in switched:
            fake_quant.enabled = id(fake_quant) in enabled
        yield
    finally:
        for fake_quant in switched:
            fake_quant.enabled = id(fake_quant) not in enabled
