"""The settings of an insertion, and how an existing plan differs from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lightning_qat.callbacks.insertion.initial_weights import InitialWeights
from lightning_qat.callbacks.schedule.frozen_parts import FrozenParts
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.plan import QuantPlan, ScaleRole
from lightning_qat.quantization.qconfig import QConfig


@dataclass(frozen=True)
class InsertionRequest:
    """What QuantizationAwareTraining asks to be inserted.

    Args:
        qconfig: defaults for activations and weights.
        overrides: rules for single points.
        profile: the hardware that the plan is for.
        is_configured: whether the user has given one of these three.
        target: ``auto``, the path of a submodule, or several.
        trace_batches: how many batches are traced to learn the ops of the model.
        train_mode: whether training steps are traced too.
        learned_scales: the scales that training finds by gradient.
        initial_weights: loaded before insertion.
        frozen_parts: frozen as soon as there are regions.
    """

    qconfig: QConfig
    overrides: list[Override]
    profile: HardwareProfile | None
    is_configured: bool
    target: str | list[str]
    trace_batches: int
    train_mode: bool
    learned_scales: tuple[ScaleRole, ...]
    initial_weights: InitialWeights
    frozen_parts: FrozenParts


def differences(plan: QuantPlan, request: InsertionRequest) -> list[str]:
    """Describe each setting in which an existing plan differs from the request of a run, with both values.

    Args:
        plan: of a checkpoint, or of a module that was quantized before.
        request: what the run asks for; a run that asks for nothing differs in nothing.
    """
    if not request.is_configured:
        return []
    here = dataclasses.asdict(request.qconfig)
    lines = [
        f"{group}.{name}: {plan.qconfig.get(group, {}).get(name)} there, {value} here"
        for group, values in here.items()
        for name, value in values.items()
        if value not in ("auto", plan.qconfig.get(group, {}).get(name))  # auto is whatever the plan has
    ]
    wanted = [rule.to_dict() for rule in request.overrides if rule.sensitivity is None]
    # a plan holds the points that were taken from a table, and the table may be gone or have grown since
    from_tables = len(wanted) < len(request.overrides)
    there = [rule for rule in plan.overrides if rule in wanted or not from_tables]
    if there != wanted:
        lines.append(f"overrides: {list(map(_short, plan.overrides))} there, {list(map(_short, wanted))} here")
    profile = request.profile.identity() if request.profile is not None else None
    if _allowed(plan.profile) != _allowed(profile):
        lines.append(f"profile: {_profile_name(plan.profile)} there, {_profile_name(profile)} here")
    return lines


def _allowed(identity: dict[str, str] | None) -> dict[str, str] | None:
    """What training depends on; the type of biases only concerns exported files."""
    return {k: v for k, v in identity.items() if k != "bias"} if identity is not None else None


def _profile_name(identity: dict[str, str] | None) -> str:
    return f"{identity['name']} ({identity['sha256'][:8]})" if identity is not None else "none"


def _short(value: Any) -> Any:
    """A rule without the fields that are not set."""
    return {k: _short(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value
