"""A target with its graph, plan and fake-quants: attaching, states, checkpoints, removal."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from lightning_qat.quantization.errors import ConfigurationError, PlanMismatchError
from lightning_qat.quantization.fake_quant.call_ranges import CallRanges
from lightning_qat.quantization.fake_quant.fake_quant_dict import FakeQuantDict
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.interception.activation_checkpointing import RunningRegion
from lightning_qat.quantization.interception.call_path import CallPaths, ScopeNode, user_location
from lightning_qat.quantization.interception.interception import CallPathMode, Intercepted, SpecCache, active_mode
from lightning_qat.quantization.modules.module_walk import REGION_NAME, modules_and_regions
from lightning_qat.quantization.planning.plan import PLAN_VERSION, QuantPlan
from lightning_qat.quantization.planning.plan_compatibility import read_extra_state, rebound
from lightning_qat.quantization.region.freezing import Freezing, freeze
from lightning_qat.quantization.region.region_mode import UNPLANNED, OpQuantizers, RegionMode, bind
from lightning_qat.quantization.region.region_scales import RegionScales
from lightning_qat.quantization.tracing.op_graph import OpGraph


class Region(RegionScales):
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
        self._traced_graph = graph if traced else None
        self.unplanned: dict[str, int] = {}
        self.call_ranges = CallRanges()
        self.functions = SpecCache()
        self._intercepted: Intercepted | None = None
        self.freezing = Freezing()
        self.set_plan(graph, plan)

    # -- what is where

    def set_plan(self, graph: OpGraph, plan: QuantPlan) -> None:
        """Replace graph, plan and fake-quants; the new fake-quants are not calibrated."""
        self.graph = graph
        self.plan = plan
        self.unplanned.clear()
        self.call_ranges.reset()
        self._stored: dict[str, Any] | None = None
        tensors = itertools.chain(self.target.parameters(), self.target.buffers())
        device = next((t.device for t in tensors), torch.device("cpu"))
        self.fake_quants = FakeQuantDict(plan).to(device)
        self.fake_quants.train(self.target.training)
        if self.freezing:
            self.freezing.apply(self)
        self._bind()

    @property
    def points(self) -> dict[str, FakeQuantize]:
        """The fake-quant of every point; weights that are used twice share one."""
        return self.fake_quants.by_point(self.plan)

    def _bind(self) -> None:
        self.call_paths = CallPaths(self.target, self._find)
        self._quantizers = bind(self.graph, self.plan, self.points, self.target)

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
        self.unfreeze()
        self._intercepted.uninstall()
        self._intercepted = None
        del self.target._modules[REGION_NAME]
        return self.target

    # -- frozen parts

    def freeze(self, patterns: str | Iterable[str]) -> None:
        """Keep parts of the target at their quantized state while the rest trains.

        The parameters of a frozen sub-tree get no gradient, so that optimizers skip them, weight decay and momentum
        included; its modules stay in eval mode whatever ``train()`` is called above them (batch norm keeps its
        statistics, dropout does nothing: as when deployed); its scales do not move, nor does a new calibration change
        them. A parameter that is used outside the sub-tree too is frozen there as well. Not part of checkpoints. Under
        ``DistributedDataParallel``, freeze before the module is wrapped.

        Args:
            patterns: globs over names of modules (their whole sub-tree), parameters and points, relative to the target.

        Raises:
            ConfigurationError: a pattern matches nothing; then nothing is frozen.

        Example:
            >>> from lightning_qat.quantization.region.insertion import insert
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
            >>> region = insert(model, (torch.randn(16, 4),))
            >>> region.freeze(["0", "1"])
            >>> [name for name, p in model.named_parameters() if p.requires_grad], model[1].training
            (['3.weight', '3.bias'], False)
            >>> region.unfreeze()
            >>> model[1].training
            True
        """
        freeze({"": self}, patterns)

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`: gradients, modes and scales are as free as they were before."""
        self.freezing.undo(self)
        self.freezing = Freezing()

    # -- running

    def open(self, frame: FrameType) -> CallPathMode | None:
        """Decide about one entry of the forward; a recursive entry is part of the running one.

        Raises:
            RuntimeError: another region is running: its fake-quants would be applied to the same ops.
        """
        outer = active_mode()
        if outer is None:
            self.freezing.hold()
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
        """Plan, graph and statistics as primitives and tensors: the entry of a ``state_dict`` that is no tensor.

        Code that copies or averages a ``state_dict`` value by value leaves it out, ``if torch.is_tensor(value)``, and
        loads with ``strict=False``. Encoded in a tensor of bytes it would pass such code, and be averaged by it.
        """
        self.refresh_weight_scales()  # the scales themselves are collected afterwards
        if self._stored is None:
            self._stored = {"version": PLAN_VERSION, "graph": self.graph.to_dict(), "plan": self.plan.to_dict()}
        return {
            **self._stored,
            "statistics": {
                p.name: fake_quant.get_statistics_state()
                for p, fake_quant in zip(self.plan.points, self.points.values(), strict=True)
                if p.same_as is None
            },
            "call_ranges": self.call_ranges.state_dict(),
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
        self.call_ranges.load_state_dict(state["call_ranges"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}_extra_state" not in state_dict and "weight" in self.updates:
            self.expect_other_weights()  # float ones or averages, perhaps: not what the scales were taken of

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for cache in ("call_paths", "functions", "_quantizers"):  # rebuilt on the other side; hold code objects
            state.pop(cache, None)
        return {**state, "taps": (), "_stored": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.functions = SpecCache()
        self._bind()

    def forward(self, value: Any) -> Any:
        """Return the argument: a target that is an ``nn.Sequential`` calls all its children, this one too."""
        return value

    def extra_repr(self) -> str:
        return f"{len(self.plan.points)} points, state={self._state}"


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
        for name, child in modules_and_regions(module)
        if isinstance(child, Region)
    }
