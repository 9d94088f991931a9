"""What of a region is on: its state, which of its scales follow the data, single points, and who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor, nn
from typing_extensions import Self

from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize

State = Literal["off", "observe", "quantize"]
Updates = Literal["weight", "activation"]
Tap = Callable[[str, Tensor, Tensor], None]


class SwitchedRegion(nn.Module):
    """The switches of a region. Every change has a context manager that puts back what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._state: State = "off"
        self._updates: frozenset[str] = frozenset({"weight"})
        self.taps: tuple[Tap, ...] = ()

    @property
    def points(self) -> dict[str, FakeQuantize]:
        """The fake-quant of every point."""
        raise NotImplementedError

    @property
    def current_state(self) -> State:
        """``off``, ``observe`` or ``quantize``."""
        return self._state

    @property
    def is_off(self) -> bool:
        """Whether the plain forward runs."""
        return self._state == "off"

    @property
    def updates(self) -> frozenset[str]:
        """Which scales follow the data while quantizing in train mode."""
        return self._updates

    def set_state(self, state: State, updates: Iterable[Updates] | None = None) -> None:
        """Switch the whole region.

        Args:
            state: ``off``: the float module, exactly and at its speed. ``observe``: float results, statistics are
                collected. ``quantize``: fake-quantized.
            updates: which scales follow the data while quantizing *in train mode*: ``weight`` (the default) and
                ``activation`` (EMA). Unchanged if not given.
        """
        if state not in get_args(State):
            raise unknown_choice("state", state, get_args(State))
        if updates is not None:
            updates = frozenset(updates)
            for update in updates:
                if update not in get_args(Updates):
                    raise unknown_choice("update", update, get_args(Updates))
            self._updates = updates
        self._state = state

    @contextmanager
    def state(self, state: State, updates: Iterable[Updates] | None = None) -> Iterator[Self]:
        """Switch the region for the duration of a block; restores exactly, also after an exception."""
        before = self._state, self._updates
        self.set_state(state, updates)
        try:
            yield self
        finally:
            self._state, self._updates = before

    @contextmanager
    def only(self, names: Iterable[str]) -> Iterator[Self]:
        """Quantize only the named points for the duration of a block."""
        points = self.points
        chosen = set(names)
        for name in chosen:
            if name not in points:
                raise unknown_choice("point", name, points)
        enabled = {id(points[name]) for name in chosen}
        switched = [f for f in points.values() if f.enabled != (id(f) in enabled)]
        try:
            for fake_quant in switched:
                fake_quant.enabled = id(fake_quant) in enabled
            yield self
        finally:
            for fake_quant in switched:
                fake_quant.enabled = id(fake_quant) not in enabled

    @contextmanager
    def tap(self, tap: Tap) -> Iterator[None]:
        """Call ``tap(point, float_value, quantized_value)`` at every quantization in the block.

        What is given of a weight with a batch norm folded into it (``PointPlan.batch_norm``) is the folded weight.
        """
        before = self.taps
        self.taps = (*before, tap)
        try:
            yield
        finally:
            self.taps = before
