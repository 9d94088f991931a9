"""The container of a region's fake-quants."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.planning.plan import PointPlan, QuantPlan


class FakeQuantDict(nn.ModuleDict):
    """The fake-quants of a plan: an ``nn.ModuleDict`` that loads its state in linear time.

    ``nn.Module.load_state_dict`` filters the keys of a container once for each of its children, which takes seconds for
    thousands of points. Here the keys are sorted once, the children are loaded directly, and hidden until torch's own
    loop over them is done.

    Args:
        plan: one fake-quant is made for each of its points; weights that are used twice share one.
    """

    def __init__(self, plan: QuantPlan) -> None:
        super().__init__({key_of(p.name): fake_quant_of(p) for p in plan.points if p.same_as is None})
        self.register_load_state_dict_post_hook(_show_children)  # type: ignore[no-untyped-call]

    def by_point(self, plan: QuantPlan) -> dict[str, FakeQuantize]:
        """Return the fake-quant of every point of the plan this was made for."""
        modules: dict[str, Any] = dict(self._modules)
        return {p.name: modules[key_of(p.same_as or p.name)] for p in plan.points}

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        children = dict(self._modules)
        groups: dict[str, dict[str, Any]] = {name: {} for name in children}
        for key, value in state_dict.items():
            if not key.startswith(prefix):
                continue
            name = key[len(prefix) :].partition(".")[0]
            if name in groups:
                groups[name][key] = value
            elif strict:
                unexpected_keys.append(key)
        metadata = {k: v for k, v in local_metadata.items() if k == "assign_to_params_buffers"}
        for name, child in children.items():
            if child is not None:
                child._load_from_state_dict(
                    groups[name], f"{prefix}{name}.", metadata, True, missing_keys, unexpected_keys, error_msgs
                )
        self.__dict__["_hidden"] = self._modules
        self.__dict__["_modules"] = {}


def fake_quant_of(point: PointPlan) -> FakeQuantize:
    """Return a new fake-quant as a point of a plan describes it, not calibrated unless its scale is fixed."""
    fake_quant = FakeQuantize(
        point.dtype,
        scheme=point.scheme,  # type: ignore[arg-type]
        axis=point.axis if point.groups == 1 else 0,
        channels=point.channels,
        split_sizes=point.split_sizes,
        batch_axis=None if point.is_weight else 0,
        observer=point.observer,  # type: ignore[arg-type]
        percentile=point.percentile,
        fixed_scale=point.fixed_scale,
        narrow_range=point.narrow_range,
    )
    fake_quant.groups = point.groups
    return fake_quant


def key_of(name: str) -> str:
    """Return the name of a point as a module is called: without dots; slashes keep it readable."""
    return name.replace(".", "/")


def _show_children(module: FakeQuantDict, _: object) -> None:
    hidden = module.__dict__.pop("_hidden", None)
    if hidden is not None:
        module.__dict__["_modules"] = hidden
