"""A target with its graph, plan and fake-quants: attaching, states, checkpoints, removal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.call_ranges import CallRanges
from lightning_qat.quantization.fake_quant.fake_quant_dict import FakeQuantDict
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.interception.interception import Intercepted
from lightning_qat.quantization.modules.module_walk import REGION_NAME, modules_and_regions
from lightning_qat.quantization.planning.plan import QuantPlan, ScaleRole
from lightning_qat.quantization.planning.plan_compatibility import LOADING_NOTE, extra_state, rebound
from lightning_qat.quantization.region.bound_points import bind
from lightning_qat.quantization.region.freezing import Freezable, Freezing, patterns_by_target
from lightning_qat.quantization.region.region_runner import RegionRunner
from lightning_qat.quantization.region.region_scales import RegionScales
from lightning_qat.quantization.region.stored_state import StateReader
from lightning_qat.quantization.region.switches import State, Switches, Tap, only
from lightning_qat.quantization.tracing.op_graph import OpGraph


class Region(nn.Module):
    """The quantized region of a model: child module ``_quantization`` of the target.

    Everything it adds to the model lives here: the fake-quants, the plan and the graph (as extra state of the
    checkpoint). The float state_dict keys stay as they are. Its parts: ``switches`` holds the state, ``scales`` derives
    and trains scales, ``freezing`` knows what is frozen, ``runner`` runs the forward, ``reader`` reads a checkpoint.

    Args:
        target: the module whose forward is quantized.
        graph: the traced ops.
        plan: the plan for them.
        traced: the graph was traced from the code of this process (False: restored from a checkpoint).
    """

    target: nn.Module

    def __init__(self, target: nn.Module, graph: OpGraph, plan: QuantPlan, traced: bool = True) -> None:
        super().__init__()
        self.__dict__["target"] = target  # not registered: the region is a child of the target
        self._traced_graph = graph if traced else None
        self.switches = Switches()
        self.freezing = Freezing()
        self.runner = RegionRunner(target, self.switches, self.freezing)
        self.reader = StateReader()
        self._intercepted: Intercepted | None = None
        self.set_plan(graph, plan)

    def set_plan(self, graph: OpGraph, plan: QuantPlan) -> None:
        """Replace graph, plan and fake-quants; the new fake-quants are not calibrated."""
        self.graph, self.plan = graph, plan
        self.unplanned.clear()
        self.call_ranges.reset()
        self._stored: dict[str, Any] | None = None
        tensors = itertools.chain(self.target.parameters(), self.target.buffers())
        self.fake_quants = FakeQuantDict(plan).to(next((t.device for t in tensors), torch.device("cpu")))
        self.fake_quants.train(self.target.training)
        self._bind()
        if self.freezing:
            self.freezing.apply(self.freezable)

    @property
    def points(self) -> dict[str, FakeQuantize]:
        """The fake-quant of every point; weights that are used twice share one."""
        return self._points

    def _bind(self) -> None:
        self._points = self.fake_quants.by_point(self.plan)
        bound = bind(self.graph, self.plan, self.points, self.target)
        self.scales = RegionScales(self.target, self.plan, self.points, bound)
        self.runner.bind(self.target, self.graph, bound, self._traced_graph)

    @property
    def call_ranges(self) -> CallRanges:
        """The range of each call of points that run several times per forward, over all calibration batches."""
        return self.runner.call_ranges

    @property
    def unplanned(self) -> dict[str, int]:
        """How often ops ran that tracing did not see, by their place."""
        return self.runner.unplanned

    def attach(self) -> Region:
        """Become a child of the target and take over its forward (which stays float until the state changes)."""
        self.target.add_module(REGION_NAME, self)
        self._intercepted = Intercepted.install(self.target, self.runner)
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

    @property
    def current_state(self) -> State:
        """``off``, ``observe`` or ``quantize``."""
        return self.switches.state

    @property
    def updates(self) -> frozenset[str]:
        """Which scales follow the data while quantizing in train mode."""
        return self.switches.updates

    def set_state(self, state: State, updates: Iterable[ScaleRole] | None = None) -> None:
        """Switch the whole region.

        Args:
            state: ``off``: the float module, exactly and at its speed. ``observe``: float, with statistics.
                ``quantize``: fake-quantized.
            updates: which scales follow the data while quantizing *in train mode*: ``weight`` (the default) and
                ``activation`` (EMA). Unchanged if not given.

        Raises:
            ConfigurationError: there is no such state or role.
        """
        self.switches.set(state, updates)
        self.runner.know_traced_orders()

    @contextmanager
    def state(self, state: State, updates: Iterable[ScaleRole] | None = None) -> Iterator[Self]:
        """Switch the region for a block, in which nothing is compiled; restores exactly, also after an exception."""
        with self.switches.kept():
            self.switches.eager = True
            self.set_state(state, updates)
            yield self

    @contextmanager
    def only(self, names: Iterable[str]) -> Iterator[Self]:
        """Quantize only the named points for the duration of a block."""
        with only(self.points, names):
            yield self

    def tap(self, tap: Tap) -> AbstractContextManager[None]:
        """Call ``tap(point, float_value, quantized_value)`` at every quantization of a ``with`` block.

        With a batch norm folded into a weight (``PointPlan.batch_norm``), both values are of the folded weight."""
        return self.switches.tap(tap)

    def set_compile(self, options: bool | Mapping[str, Any] = True) -> None:
        """Compile the quantized forward: True, or arguments of ``torch.compile``.

        False keeps it eager also within a ``torch.compile`` of your own."""
        self.runner.compile(options)

    @property
    def is_calibrated(self) -> bool:
        """Whether scales were computed or restored: at least one that is not merely fixed by the configuration."""
        return self.scales.are_calibrated

    def compute_scales(self, observer: str | None = None, dtype: str | None = None) -> tuple[str, ...]:
        """Derive all scales except frozen ones from the statistics that calibration kept.

        Args:
            observer: another method than planned, for every point without a fixed scale.
            dtype: another dtype than planned.

        Returns:
            Names of the points that never saw a finite value; they have no scale and stay float.
        """
        return self.scales.compute(observer, dtype)

    def learn_scales(self, roles: Iterable[ScaleRole] = ("weight", "activation")) -> None:
        """Make the scales of these roles parameters, trained with the gradient of LSQ, and all others buffers.

        Call it before the optimizer is built, before or after calibration. Fixed scales stay buffers. Weight decay
        would shrink scales to zero: see :func:`lightning_qat.parameter_groups`. A checkpoint overrides the roles.

        Args:
            roles: ``weight``, ``activation`` or both; an empty set ends learning. Others are a ConfigurationError.

        Example:
            >>> from lightning_qat.quantization.region.insertion import insert
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> region = insert(model, (torch.randn(16, 4),))
            >>> region.learn_scales({"weight"})
            >>> {name: tuple(scale.shape) for name, scale in region.learned_scales.items()}
            {'0.weight': (8,), '2.weight': (2,)}
        """
        self.scales.learn(roles)

    @property
    def learned_scales(self) -> dict[str, nn.Parameter]:
        """The scales that are parameters, by point; one that points share is listed once."""
        return self.scales.learned

    def freeze(self, patterns: str | Iterable[str]) -> None:
        """Keep parts of the target at their quantized state while the rest trains. Freeze before DDP wraps the module.

        Frozen parameters get no gradient, modules stay in eval mode, scales do not move. Checkpoints do not store it.

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
        """
        (chosen,) = patterns_by_target({"": self.freezable}, patterns).values()
        if chosen:
            self.freeze_selected(chosen)

    def freeze_selected(self, patterns: Iterable[str]) -> None:
        """Freeze by patterns that :func:`patterns_by_target` has chosen for this region."""
        self.scales.refresh_weights()
        self.freezing.add(self.freezable, patterns)

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`: gradients and modes are as before, and scales move again."""
        self.freezing.undo(self.target)

    @property
    def freezable(self) -> Freezable:
        """The parts of this region that freezing needs."""
        return Freezable(self.target, self.graph, self.plan, self.points)

    def get_extra_state(self) -> dict[str, Any]:
        """Return plan, graph and statistics as primitives and tensors: the entry of a state_dict that is no tensor.

        Code that copies or averages a ``state_dict`` value by value leaves it out, ``if torch.is_tensor(value)``, and
        loads with ``strict=False``. Such code would average it if it were encoded as a tensor of bytes.
        """
        self.scales.refresh_weights()  # the scales themselves are collected afterwards
        if self._stored is None:
            self._stored = extra_state(self.graph, self.plan)
        return {
            **self._stored,
            "statistics": self.scales.packed_statistics(),
            "call_ranges": self.call_ranges.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adopt a stored plan; called by load_state_dict before the fake-quants load their scales.

        Raises:
            PlanMismatchError: the state is damaged, or the plan does not fit the code.
        """
        graph, plan = self.reader.read(state)  # all of it is checked, and nothing is changed yet
        if plan != self.plan:
            graph = rebound(graph, self._traced_graph) if self._traced_graph is not None else graph
            self.set_plan(graph, plan)
        for name, statistics in state["statistics"].items():
            self.points[name].load_statistics_state(statistics)
        self.call_ranges.load_state_dict(state["call_ranges"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + LOADING_NOTE] = torch.empty(0)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + LOADING_NOTE, None)
        self.reader.check(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}_extra_state" not in state_dict and "weight" in self.updates:
            self.scales.expect_other_weights()  # perhaps float or averaged ones, which need other scales

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("scales", "_points")}  # anew
        return {**state, "_stored": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bind()

    def forward(self, value: Any) -> Any:
        """Return the argument: a target that is an ``nn.Sequential`` calls all its children, this one too."""
        return value

    def extra_repr(self) -> str:
        return f"{len(self.plan.points)} points, state={self.current_state}"


def find_regions(module: nn.Module) -> dict[str, Region]:
    """Return the regions inside a module by the path of their target (``""`` for the module itself)."""
    return {
        name.removesuffix(REGION_NAME).removesuffix("."): child
        for name, child in modules_and_regions(module)
        if isinstance(child, Region)
    }
