"""Hardware profiles: which types each op can read and return on the hardware, and which ops it computes as one.

A profile is data, usually a small YAML file; ``lightning_qat/profiles/README.md`` says how to write one.
:func:`~lightning_qat.quantization.planning.hardware_profile_files.hardware_profile` reads it. To add a key to these
files, add a field here, read the key there and describe it in that README. If the key changes what is allowed, add it
to :attr:`HardwareProfile.digest`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lightning_qat.quantization.numerics.dtypes import is_float, quant_dtype
from lightning_qat.quantization.planning.fusion_patterns import DEFAULT_PATTERNS, FusionPatterns

FLOAT = "float32"


@dataclass(frozen=True)
class Signature:
    """One combination of types that the hardware can compute an op with.

    Args:
        input: types an input may have; inputs may differ from each other. ``float32``: the op reads floats, and
            quantized inputs are dequantized before.
        weight: types a weight may have; empty for an op without one.
        output: types the result may have. ``float32``: the accumulator is dequantized.
    """

    input: tuple[str, ...]
    weight: tuple[str, ...]
    output: tuple[str, ...]

    def takes(self, dtype: str) -> bool:
        """Whether an input of this type can be read."""
        return dtype in self.input or FLOAT in self.input

    def takes_weight(self, dtype: str) -> bool:
        """Whether a weight of this type can be used."""
        return dtype in self.weight

    def __str__(self) -> str:
        weight = f", weight {either(self.weight)}" if self.weight else ""
        return f"input {either(self.input)}{weight} -> output {either(self.output)}"


@dataclass(frozen=True)
class OpRule:
    """The types, schemes and granularities that the hardware can compute an op with.

    Args:
        signatures: the combinations of types, the preferred one first.
        schemes: the schemes that activations may have.
        weight_granularity: the granularities that weights may have.
    """

    signatures: tuple[Signature, ...]
    schemes: tuple[str, ...] = ("symmetric",)
    weight_granularity: tuple[str, ...] = ("per_tensor", "per_channel")

    def moves(self, dtype: str) -> bool:
        """Whether the op can return values in the type in which it reads them, for this type."""
        return any(dtype in s.input and dtype in s.output for s in self.signatures)

    def inputs(self) -> tuple[str, ...]:
        """All types an input may have."""
        return union(s.input for s in self.signatures)

    def weights(self) -> tuple[str, ...]:
        """All types a weight may have."""
        return union(s.weight for s in self.signatures)

    def outputs(self) -> tuple[str, ...]:
        """All types the result may have."""
        return union(s.output for s in self.signatures)


@dataclass(frozen=True)
class HardwareProfile:
    """A hardware profile.

    Args:
        name: the name that reports show.
        rules: the rule of each kind of op. An op that computes and has no rule is not supported: it runs in float. An
            op that only moves data and has no rule takes every type.
        patterns: the sequences of kinds that are computed as one.
        version: version of the profile.
        description: a text for people.
        source: where the facts come from.
        unsupported: kinds that have no rule on purpose, each with the reason.
        cost: time per operation by kind of op and type, relative to any unit; ``*`` is every kind without an entry.
            Only the choice of types in :func:`lightning_qat.measure_errors` uses it.
        bias: ``float32``, or ``int32``: exported files hold the biases of layers as integers, with the scale of the
            input times that of the weight.

    Example:
        >>> from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
        >>> profile = hardware_profile("generic_int8_int16")
        >>> print(profile.rules["conv2d"].signatures[0])
        input int8, weight int8 -> output int8|int16|float32
    """

    name: str
    rules: Mapping[str, OpRule]
    patterns: FusionPatterns = DEFAULT_PATTERNS
    version: str = "1"
    description: str = ""
    source: str = ""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bias: str = FLOAT

    def why_unsupported(self, kind: str) -> str:
        """Say why an op without a rule runs in float."""
        given = self.unsupported.get(kind)
        return f"profile {self.name}: {kind} is not supported{f' ({given})' if given else ''}: runs in float"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the profile allows: the same for profiles that differ in name or description only."""
        content = {
            "rules": {
                kind: {
                    "signatures": [[s.input, s.weight, s.output] for s in rule.signatures],
                    "schemes": rule.schemes,
                    "weight_granularity": rule.weight_granularity,
                }
                for kind, rule in sorted(self.rules.items())
            },
            "patterns": sorted(self.patterns.sequences),
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        """Return what a plan stores about the profile it was made under."""
        found = {"name": self.name, "version": self.version, "sha256": self.digest}
        return found if self.bias == FLOAT else {**found, "bias": self.bias}


def nearest_dtype(wanted: str, options: Iterable[str]) -> str:
    """Return the type that can replace another: at least as wide and of the same sign if possible, float32 last.

    Args:
        wanted: a quantized type.
        options: at least one.

    Example:
        >>> nearest_dtype("int4", ["float32", "int16", "int8"]), nearest_dtype("int16", ["uint8", "int8"])
        ('int8', 'int8')
    """
    dtype = quant_dtype(wanted)

    def distance(name: str) -> tuple[bool, bool, bool, int]:
        if is_float(name):
            return (True, True, True, 0)
        option = quant_dtype(name)
        return (False, option.signed != dtype.signed, option.bits < dtype.bits, abs(option.bits - dtype.bits))

    return min(options, key=distance)


def union(sets: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return every name in the sets once, in order."""
    return tuple(dict.fromkeys(name for names in sets for name in names))


def either(names: Iterable[str]) -> str:
    """Format alternatives as reports show them: ``int8|int16``."""
    return "|".join(names)
