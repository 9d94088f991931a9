"""A target with its graph, plan and fake-quants: attaching, states, checkpoints, removal."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_qat.quantization.activation_checkpointing import RunningRegion
from lightning_qat.quantization.call_path import CallPaths, ScopeNode, user_location
from lightning_qat.quantization.errors import ConfigurationError, PlanMismatchError, unknown_choice
from lightning_qat.quantization.fake_quant_dict import FakeQuantDict
from lightning_qat.quantization.fake_quantize import FakeQuantize
from lightning_qat.quantization.histogram import reduce_device
from lightning_qat.quantization.interception import CallPathMode, FunctionTable, Intercepted, active_mode
from lightning_qat.quantization.op_graph import OpGraph
from lightning_qat.quantization.plan import PLAN_VERSION, QuantPlan
from lightning_qat.quantization.plan_compatibility import rebound
from lightning_qat.quantization.region_mode import UNPLANNED, OpQuantizers, RegionMode, bind

State = Literal["off", "observe", "quantize"]
Updates = Literal["weight", "activation"]
Tap = Callable[[str, Tensor, Tensor], None]
REGION_NAME = "_quantization"


class Region(nn.Module):
    """The quantized region of a model: child module ``_quantization`` of the target.

    Everything it adds to the model lives here: the fake-quants, the plan and the graph (as extra state of the
    checkpoint). The float state_dict keys stay as they are.

    Args:
        target: the module whose forward is quantized.
        graph: what was traced.
        plan: what was decided.
        traced: the graph was traced from the code of this process (False: restored from a checkpoint).
    """

    target: nn.Module

    def __init__(self, target: nn.Module, graph: OpGraph, plan: QuantPlan, traced: bool = True) -> None:
        super().__init__()
        self.__dict__["target"] = target  # not registered: the region is a child of the target
        self._state: State = "off"
        self._updates: frozenset[str] = frozenset({"weight"})
        self.taps: tuple[Tap, ...] = ()
        self._traced_graph = graph if traced else None
        self.unplanned: dict[str, int] = {}
        self.functions = FunctionTable()
        self._intercepted: Intercepted | None = None
        self.set_plan(graph, plan)

    # -- what is where

    def set_plan(self, graph: OpGraph, plan: QuantPlan) -> None:
        """Replace graph, plan and fake-quants; the new fake-quants are not calibrated."""
        self.graph = graph
        self.plan = plan
        self.unplanned.clear()
        self._stored: dict[str, Any] | None = None
        tensors = itertools.chain(self.target.parameters(), self.target.buffers())
        device = next((t.device for t in tensors), torch.device("cpu"))
        self.fake_quants = FakeQuantDict(plan).to(device)
        self.fake_quants.train(self.target.training)
        self._bind()

    @property
    def points(self) -> dict[str, FakeQuantize]:
        """The fake-quant of every point; weights that are used twice share one."""
        return self.fake_quants.by_point(self.plan)

    def _bind(self) -> None:
        self.call_paths = CallPaths(self.target, self._find)
        self._quantizers = bind(self.graph, self.plan, self.points)

    def _find(self, digest: str, node: ScopeNode, kind: str) -> OpQuantizers:
        return self._quantizers.get(digest, UNPLANNED)

    # -- attaching and removing

    def attach(self) -> Region:
        """Become a child of the target and take over its forward (which stays float until the state changes)."""
        check_target(self.target)
        self.target.add_module(REGION_NAME, self)
        self._intercepted = Intercepted.install(self.target, self)
        return self

    def remove(self) -> nn.Module:
        """Take everything off again and return the float module."""
        if self._intercepted is None:
            raise ConfigurationError("this region is not attached to a module (removed twice?).")
        self._intercepted.uninstall()
        self._intercepted = None
        del self.target._modules[REGION_NAME]
        return self.target

    # -- state

    @property
    def current_state(self) -> State:
        """``off``, ``observe`` or ``quantize``."""
        return self._state

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
    def state(self, state: State, updates: Iterable[Updates] | None = None) -> Iterator[Region]:
        """Switch the region for the duration of a block; restores exactly, also after an exception."""
        before = self._state, self._updates
        self.set_state(state, updates)
        try:
            yield self
        finally:
            self._state, self._updates = before

    @contextmanager
    def only(self, names: Iterable[str]) -> Iterator[Region]:
        """Quantize only the named points for the duration of a block."""
        points = self.points
        chosen = set(names)
        for name in chosen:
            if name not in points:
                raise unknown_choice("point", name, points)
        before = [(fake_quant, fake_quant.enabled) for fake_quant in points.values()]
        enabled = {id(points[name]) for name in chosen}
        try:
            for fake_quant, _ in before:
                fake_quant.enabled = id(fake_quant) in enabled
            yield self
        finally:
            for fake_quant, flag in before:
                fake_quant.enabled = flag

    @contextmanager
    def tap(self, tap: Tap) -> Iterator[None]:
        """Call ``tap(point, float_value, quantized_value)`` at every quantization in the block."""
        before = self.taps
        self.taps = (*before, tap)
        try:
            yield
        finally:
            self.taps = before

    # -- scales

    def reset_statistics(self) -> None:
        """Forget what was observed, before a new calibration; the scales stay."""
        for fake_quant in self.points.values():
            fake_quant.reset_statistics()

    def compute_scales(self, observer: str | None = None, dtype: str | None = None) -> tuple[str, ...]:
        """Derive all scales from the statistics that calibration kept.

        Args:
            observer: another method than planned, for every point without a fixed scale.
            dtype: another dtype than planned.

        Returns:
            Names of the points that never saw a finite value; they have no scale and stay float.
        """
        without_data = []
        for name, fake_quant in self.points.items():
            if fake_quant.fixed_scale is not None:
                fake_quant.compute_scale(None, dtype)
            elif fake_quant.statistics.count:
                fake_quant.compute_scale(observer, dtype)
            else:
                without_data.append(name)
        return tuple(without_data)

    def synchronize_scales(self) -> None:
        """Give all ranks the same activation scales, for scales that follow each rank's own batches.

        The moving averages themselves are averaged, in one reduction, so that a checkpoint of any rank is that of all.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        points = self.points
        moving = [points[p.name] for p in self.plan.points if not p.is_weight]
        moving = [f for f in moving if f.scale_source not in (None, "fixed")]
        if not moving:
            return
        averages = torch.stack([f.statistics.averages for f in moving]).to(reduce_device(None), torch.float32)
        dist.all_reduce(averages)
        averages /= dist.get_world_size()
        for fake_quant, average in zip(moving, averages, strict=True):
            fake_quant.set_averages(average)

    @property
    def is_calibrated(self) -> bool:
        """Whether scales were computed or restored: at least one that is not merely fixed by the configuration."""
        sources = {f.scale_source for f in self.points.values()}
        return bool(sources - {None, "fixed"}) or None not in sources

    # -- running

    @property
    def is_off(self) -> bool:
        """Whether the plain forward runs."""
        return self._state == "off"

    def open(self, frame: FrameType) -> CallPathMode | None:
        """Decide about one entry of the forward; a recursive entry is part of the running one.

        Raises:
            RuntimeError: another region is running: its fake-quants would be applied to the same ops.
        """
        outer = active_mode()
        if outer is None:
            return RegionMode(self, frame)
        if active_mode(self.call_paths) is not None:
            return None
        raise RuntimeError(
            f"the quantized region {type(self.target).__name__} was called inside another one, "
            f"{type(outer.calls.paths.target).__name__}: make only one of the two a target."
        )

    def run(
        self, mode: CallPathMode, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward under a mode; frames (and the tensors they hold) are let go at the end."""
        try:
            with RunningRegion(), mode:
                return forward(*args, **kwargs)
        finally:
            mode.calls.clear()

    def note_unplanned(self, kind: str, frame: FrameType) -> None:
        """Count an op that was not seen while tracing; it runs in float and is reported once per place.

        Not reported is what pruning computes from a parameter, and started to compute after tracing: the product is
        quantized where it is used, by the weight's own fake-quant.
        """
        if frame.f_code.co_filename == prune.__file__:
            return
        location = f"{kind} at {user_location(frame)}"
        count = self.unplanned.get(location, 0)
        self.unplanned[location] = count + 1
        if count:
            return
        if self._traced_graph is None and not self.graph.varying:
            raise PlanMismatchError(
                f"the restored plan of {self.graph.target_type} does not know {location}: the code differs from the "
                "one the checkpoint was made with. Restore the code, or insert fake-quant anew and calibrate."
            )
        warnings.warn(
            f"{location} was not seen while tracing {self.graph.target_type}; it runs in float. Trace batches that "
            "reach it, or, if its repetition varies, put the code into `with dynamic_block(self, ...)`.",
            UserWarning,
            stacklevel=2,
        )

    # -- checkpoints and copies

    def get_extra_state(self) -> dict[str, Any]:
        """Plan, graph and statistics as primitives and tensors."""
        if self._stored is None:
            self._stored = {"version": PLAN_VERSION, "graph": self.graph.to_dict(), "plan": self.plan.to_dict()}
        return {
            **self._stored,
            "statistics": {
                p.name: fake_quant.get_statistics_state()
                for p, fake_quant in zip(self.plan.points, self.points.values(), strict=True)
                if p.same_as is None
            },
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adopt a stored plan; called by load_state_dict before the fake-quants load their scales.

        Raises:
            PlanMismatchError: the plan does not fit the code.
        """
        graph, plan = read_extra_state(state)
        if plan != self.plan:
            graph = rebound(graph, self._traced_graph) if self._traced_graph is not None else graph
            self.set_plan(graph, plan)
        points = self.points
        for name, statistics in state["statistics"].items():
            points[name].load_statistics_state(statistics)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for cache in ("call_paths", "functions", "_quantizers"):  # rebuilt on the other side; hold code objects
            state.pop(cache, None)
        return {**state, "taps": (), "_stored": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.functions = FunctionTable()
        self._bind()

    def forward(self, value: Any) -> Any:
        """Return the argument: a target that is an ``nn.Sequential`` calls all its children, this one too."""
        return value

    def extra_repr(self) -> str:
        return f"{len(self.plan.points)} points, state={self._state}"


def read_extra_state(state: dict[str, Any]) -> tuple[OpGraph, QuantPlan]:
    """Read graph and plan from a region's extra state in a checkpoint."""
    if state.get("version") != PLAN_VERSION:
        raise PlanMismatchError(
            f"the checkpoint holds a plan of version {state.get('version')!r}, this release reads version "
            f"{PLAN_VERSION}: use the release it was made with."
        )
    return OpGraph.from_dict(state["graph"]), QuantPlan.from_dict(state["plan"])


def check_target(module: nn.Module) -> None:
    """Refuse a module that is quantized already, or whose forward cannot be taken over.

    Raises:
        ConfigurationError: it has, or contains, a region; or it is a script module.
    """
    name = type(module).__name__
    regions = find_regions(module)
    if "" in regions:
        raise ConfigurationError(f"{name} already has fake-quants; remove() them first.")
    if regions:
        raise ConfigurationError(
            f"{name} contains quantized regions ({', '.join(regions)}): an op must not be quantized twice. Remove them "
            "first, or leave this target out."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigurationError(
            f"{name} is a script module, whose ops cannot be seen: pass the module it was made of."
        )


def find_regions(module: nn.Module) -> dict[str, Region]:
    """Return the regions inside a module by the path of their target (``""`` for the module itself)."""
    return {
        name.removesuffix(REGION_NAME).removesuffix("."): child
        for name, child in module.named_modules()
        if isinstance(child, Region)
    }
