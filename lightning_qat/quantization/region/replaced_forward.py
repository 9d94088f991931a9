"""Running a region's target under another mode than the region's own, for the duration of a block."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self, override

from lightning_qat.quantization.interception.interception import Intercepted, InterceptionMode, Opener, active_mode
from lightning_qat.quantization.interception.op_identity import OpIdentity
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.region_mode import RegionMode


class ReplacedForward(Opener):
    """Context manager in which the forwards of a region's target run under :meth:`mode`.

    Args:
        region: the region whose target runs.
    """

    def __init__(self, region: Region) -> None:
        self.region = region

    @override
    def run(
        self, mode: InterceptionMode, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return self.region.runner.run(mode, forward, args, kwargs)

    def mode(self, identity: OpIdentity) -> InterceptionMode:
        """Return the mode of one forward.

        Args:
            identity: identifies the ops of this forward.
        """
        raise NotImplementedError

    def open(self, frame: FrameType) -> InterceptionMode | None:
        """Start a forward; a recursive entry is part of the forward that runs."""
        runner = self.region.runner
        return None if active_mode(runner.call_paths) else self.mode(runner.identity(frame))

    def __enter__(self) -> Self:
        self._intercepted = Intercepted.install(self.region.target, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._intercepted.uninstall()


class InspectingMode(RegionMode):
    """A mode that does something else at every op of the plan: override :meth:`RegionMode.run_op`.

    Activation checkpointing is switched off inside, because a repeated function would meet the same ops twice.
    """

    keeps_activations = True

    @override
    def resumed(self, frame: FrameType, scope: Any) -> InterceptionMode | None:
        return None
