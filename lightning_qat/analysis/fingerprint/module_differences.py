"""How the modules of two pipelines differ: in their settings, their code, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_qat.analysis.fingerprint.difference import PipelineDifference, Suspicion, module_names
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.layer_calls import LayerCall, Sketch, relative_distance
from lightning_qat.analysis.fingerprint.module_settings import EXTRA_REPR, ModuleSettings
from lightning_qat.analysis.model_check.finding import shortened
from lightning_qat.analysis.tolerance import ROUNDING

LAYERS, MODULES, ATTRIBUTES, CODE, UPDATES = "layers", "module", "attribute", "code", "updates"
"""Parts of a pipeline: what layers compute, the settings of torch's modules and of others, the code of their forward,
what training updates."""
EXTRA = "extra module"
"""Modules that only one pipeline has: what they do shows in the weights, layers and losses, so they explain nothing."""
FROZEN = "frozen"
"""What a parameter is that training does not update."""
_ROUNDING_OF_16_BITS = 0.05
_AGREES = 0.1
"""An input agrees if it differs by less than this share of the difference of the output."""
_INSIDE = 5.0
"""A difference inside a module that hardly shows in its output counts if it is so many times larger."""
_TRAINING_ONLY = frozenset({"p", "drop_prob", "momentum"})
"""Settings of layers that act only in training, so that the outputs in evaluation do not show them."""
_RUN_SETTINGS = frozenset({"learning_rate", "max_lr", "batch_size", "weight_decay", "max_epochs"})
Setting = tuple[str, str, str, str]
"""Class, name, value in the reference, and value here."""


def module_differences(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    """Name the first module that computes something else, then settings and code that differ."""
    yield from _updates(reference, here)
    if reference.modules is None or reference.layers is None:
        what = (
            "the reference was made by an earlier release: the settings of modules and what layers compute are not "
            "compared. Make a new one."
        )
        if here.modules is not None:
            yield PipelineDifference("unlikely", "fingerprint", "modules", "", "", what)
        return
    yield from _layers(reference, here)
    yield from _settings(reference, here)


def _layers(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    """By stage the first module whose output differs though its input and its weights agree."""
    named = set()
    for stage in ("validate", "train"):
        pairs = _pairs(*((f.layers or {}).get(stage, ()) for f in (reference, here)))
        key = _first(pairs, reference, here)
        if key is None or key[0] in named:
            continue
        name = key[0]
        named.add(name)
        before, now = pairs[key]
        distance = _distance(before.outputs, now.outputs)
        much = f"differs by {distance:.1%}" if distance <= 1 else "is another"
        kind = here.modules[name].kind if here.modules and name in here.modules else "module"
        what = (
            f"{name or 'the model'} ({kind}) computes something else from the same input with the same weights: its "
            f"output {much} ({stage} step): {_explained(name, reference, here)}{_place(name, pairs)}"
        )
        yield PipelineDifference("strong", f"{LAYERS} ({stage})", module_names([name]), "", much, what)


Pairs = dict[tuple[str, int], tuple[LayerCall, LayerCall]]
"""Both calls, that of the reference first, by name and number of the call; in the order in which they begin."""


def _pairs(before: tuple[LayerCall, ...], now: tuple[LayerCall, ...]) -> Pairs:
    known = _numbered(before)
    return {key: (known[key], call) for key, call in _numbered(now).items() if key in known}


def _numbered(calls: tuple[LayerCall, ...]) -> dict[tuple[str, int], LayerCall]:
    counts: dict[str, int] = {}
    numbered = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, -1) + 1
        numbered[call.name, counts[call.name]] = call
    return numbered


def _first(pairs: Pairs, reference: Fingerprint, here: Fingerprint) -> tuple[str, int] | None:
    """The first call that is to blame; of calls inside each other the innermost."""
    least = _least(reference, here)
    found = None
    for key, (before, now) in pairs.items():
        if found is not None and not _is_inside(now.name, found[0]):
            continue
        inside = max((_distance(b.inputs, n.inputs) for b, n in _calls_inside(now.name, pairs)), default=0.0)
        distance = max(_distance(before.outputs, now.outputs), inside / _INSIDE)
        agrees = distance > least and _distance(before.inputs, now.inputs) <= _AGREES * min(distance, 1.0)
        if agrees and _same_weights(now.name, reference, here) and _leaves_a_trace(now.name, pairs, least):
            found = key
    return found


def _leaves_a_trace(path: str, pairs: Pairs, least: float) -> bool:
    """Whether the modules around it compute something else as well: a part that moved to another module does not."""
    around = [(before, now) for before, now in pairs.values() if _is_inside(path, now.name)]
    return all(_distance(before.outputs, now.outputs) > least / 10 for before, now in around)


def _least(reference: Fingerprint, here: Fingerprint) -> float:
    """The relative difference that rounding may make of the output of one module."""
    precisions = [str(f.settings.get("precision", "32")) for f in (reference, here)]
    return _ROUNDING_OF_16_BITS if any("16" in precision for precision in precisions) else ROUNDING


def _is_inside(name: str, path: str) -> bool:
    return name != path and (not path or name.startswith(f"{path}."))


def _calls_inside(path: str, pairs: Pairs) -> list[tuple[LayerCall, LayerCall]]:
    return [(before, now) for before, now in pairs.values() if _is_inside(now.name, path)]


def _distance(before: dict[str, Sketch], now: dict[str, Sketch]) -> float:
    if before.keys() != now.keys():
        return float("inf")
    return max((relative_distance(before[name], now[name]) for name in now), default=0.0)


def _same_weights(path: str, reference: Fingerprint, here: Fingerprint) -> bool:
    names = reference.weights.keys() | here.weights.keys()
    return all(
        reference.weights.get(name) == here.weights.get(name)
        for name in names
        if name == path or _is_inside(name, path)
    )


def _explained(path: str, reference: Fingerprint, here: Fingerprint) -> str:
    """Say which settings or whose code differ inside a module."""
    words = [
        f"{kind} {name} {before} -> {now} ({module_names(names)})"
        for (kind, name, before, now), names in _different_settings(reference, here).items()
        if any(name == path or _is_inside(name, path) for name in names)
    ]
    codes = [name for name in _other_code(reference, here) if name == path or _is_inside(name, path)]
    if codes:
        words.append(f"the code of the forward of {module_names(codes)} differs")
    if words:
        return shortened(words)
    return (
        "neither its settings nor its code differ, so look at what it uses beside them (a constant, a function, a "
        "tensor that is no buffer, another version of a library)"
    )


def _place(path: str, pairs: Pairs) -> str:
    """Say between which modules inside it the difference comes up, if it has some."""
    agrees = ""
    for before, now in _calls_inside(path, pairs):
        if _distance(before.inputs, now.inputs) > ROUNDING:
            return f"; it comes up {f'after {agrees} and ' if agrees else ''}before {now.name}"
        agrees = now.name
    return f"; it comes up after {agrees}" if agrees else ""


def _settings(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    modules, known = here.modules or {}, reference.modules or {}
    for (kind, name, before, now), names in _different_settings(reference, here).items():
        is_library = all(modules[n].library or known[n].library for n in names)
        shown = name in _TRAINING_ONLY or not all(_computes_the_same(n, reference, here) for n in names)
        is_suspicious = shown and (is_library or not _is_of_the_run(name, reference))
        suspicion: Suspicion = "possible" if is_suspicious else "unlikely"
        part, where = MODULES if is_library else ATTRIBUTES, module_names(names)
        yield PipelineDifference(suspicion, part, where, before, now, f"{kind} {name}: {before} -> {now} ({where})")
    if codes := _other_code(reference, here):
        kinds = shortened(list(dict.fromkeys(modules[name].kind for name in codes)))
        what = f"the code of the forward of {kinds} differs ({module_names(codes)})"
        same = all(_computes_the_same(name, reference, here) for name in codes)
        yield PipelineDifference("unlikely" if same else "possible", CODE, module_names(codes), "", "", what)
    for one, other, where in ((known, modules, "here"), (modules, known, "in the reference")):
        extra = [name for name in other if name not in one and other[name].library]
        dropping = [name for name in extra if _drops(other[name])]
        for part, names in ((MODULES, dropping), (EXTRA, [name for name in extra if name not in dropping])):
            if names:
                what = f"modules that exist only {where}: {shortened([f'{n} ({other[n].kind})' for n in names])}"
                yield PipelineDifference("possible", part, shortened(names), "", "", what)


def _drops(module: ModuleSettings) -> bool:
    """Whether it is dropout of torch: it acts only in training, so no layer and no weight shows it."""
    return "Dropout" in module.kind and module.settings.get("p") != 0


def _different_settings(reference: Fingerprint, here: Fingerprint) -> dict[Setting, list[str]]:
    """Settings that differ, each with the modules that have it."""
    found: dict[Setting, list[str]] = {}
    known = reference.modules or {}
    for name, module in (here.modules or {}).items():
        if name not in known:
            continue
        before = known[name]
        if before.kind != module.kind and name:  # the project itself may have another name
            found.setdefault((module.kind, "class", before.kind, module.kind), []).append(name)
            continue
        differing = [
            key
            for key in before.settings.keys() & module.settings.keys()
            if before.settings[key] != module.settings[key] and not (key == "momentum" and name in reference.batch_norm)
        ]
        if len(differing) > 1 and EXTRA_REPR in differing:
            differing.remove(EXTRA_REPR)  # it shows the same
        for key in sorted(differing):
            values = _text(before.settings[key]), _text(module.settings[key])
            found.setdefault((module.kind, key, *values), []).append(name)
    return found


def _other_code(reference: Fingerprint, here: Fingerprint) -> list[str]:
    """Modules of the same class whose forward has other code."""
    python = [f.versions.get("python", "").rpartition(".")[0] for f in (reference, here)]
    if python[0] != python[1]:
        return []  # another version may write the same code in another way
    known = reference.modules or {}
    return [
        name
        for name, module in (here.modules or {}).items()
        if module.code and name in known and known[name].code not in ("", module.code)
    ]


def _is_of_the_run(name: str, reference: Fingerprint) -> bool:
    """Whether a setting belongs to the run, not to the model: QAT has a learning rate of its own."""
    name = name.removeprefix("hparams.")
    groups = [group for optimizer in reference.optimizers for group in optimizer.get("groups", ())]
    return name.endswith("lr") or name in _RUN_SETTINGS or any(name in group for group in groups)


def _computes_the_same(name: str, reference: Fingerprint, here: Fingerprint) -> bool:
    """Whether every step shows that a module does what it does in the reference."""
    stages = [_pairs(calls, (here.layers or {}).get(stage, ())) for stage, calls in (reference.layers or {}).items()]
    found = [pair for pairs in stages for key, pair in pairs.items() if key[0] == name]
    least = _least(reference, here)
    return bool(found) and all(
        _distance(before.inputs, now.inputs) <= least and _distance(before.outputs, now.outputs) <= least
        for before, now in found
    )


def newly_frozen(reference: Fingerprint, here: Fingerprint) -> list[str]:
    """Return the parameters that training updates in the reference only."""
    if reference.untrained is None or here.untrained is None:
        return []
    known = reference.weights  # by module
    return [n for n in here.untrained if n not in reference.untrained and n.rpartition(".")[0] in known]


def _updates(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    if reference.untrained is None or here.untrained is None:
        return
    frozen = newly_frozen(reference, here)
    trained = [name for name in reference.untrained if name not in here.untrained]
    if frozen:
        what = f"training does not update {shortened(frozen)} here, and did in the float run: frozen by accident?"
        yield PipelineDifference("possible", UPDATES, shortened(frozen), "updated", FROZEN, what)
    if trained:
        what = f"training updates {shortened(trained)} here, and did not in the float run: no longer frozen?"
        yield PipelineDifference("possible", UPDATES, shortened(trained), FROZEN, "updated", what)


def _text(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
