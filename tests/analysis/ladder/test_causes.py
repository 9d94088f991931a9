"""The difference that is named as the cause is not one that follows from another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from torch import nn

from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints
from lightning_qat.analysis.fingerprint.layer_calls import LayerCall, Sketch
from lightning_qat.analysis.fingerprint.module_settings import ModuleSettings, module_settings
from tests.analysis.ladder.test_verdict import HERE, finetune, judged, trained


def layer(name: str, value: float, given: float = 1.0) -> LayerCall:
    """A call whose output, or input, is one number."""
    return LayerCall(
        name, {"0": Sketch((1,), given, (given, *7 * (0.0,)))}, {"0": Sketch((1,), value, (value, *7 * (0.0,)))}
    )


def with_layers(*calls: LayerCall, **kwargs: Any) -> Fingerprint:
    modules = {call.name: ModuleSettings("Layer") for call in calls}
    return dataclasses.replace(HERE, modules=modules, layers={"validate": calls, "train": calls}, **kwargs)


def test_labels_are_a_consequence_where_a_layer_computes_something_else() -> None:
    """Answers of other layers do not fit the labels, the loss is another: the layer is the cause."""
    worse = {
        "agreement": {"train": {"model=1": 0.3}, "validate": {"model=1": 0.3}},
        "losses": {"train_loss (batch norm in eval)": 2.0},
        "metrics": {"val_acc": 0.3},
    }
    reference = with_layers(layer("", 1.0), layer("conv", 1.0), layer("act", 1.0))
    result = judged(reference, with_layers(layer("", 2.0), layer("conv", 1.0), layer("act", 1.5), **worse))
    assert (result.verdict, result.rung) == ("pipeline misaligned", 0)
    assert "act (Layer) computes something else" in result.cause
    assert {row.part for row in result.differences.strong} == {"layers (validate)"}
    plain = judged(reference, with_layers(layer("", 1.0), layer("conv", 1.0), layer("act", 1.0), **worse))
    assert "do labels and inputs belong together" in plain.cause  # nothing else explains it


def test_layer_is_named_only_where_its_input_and_weights_agree() -> None:
    """An input that differs already, and other weights, say nothing about the layer; nor does rounding."""
    reference = with_layers(layer("a", 1.0), layer("b", 1.0, 1.0))

    def strong(*calls: LayerCall, **kwargs: Any) -> list[str]:
        here = with_layers(*calls, **kwargs)
        return [row.name for row in compare_fingerprints(reference, here).strong if row.part.startswith("layers")]

    assert strong(layer("a", 1.5), layer("b", 1.5, 1.5)) == ["a"]
    assert strong(layer("a", 1.0), layer("b", 1.5, 1.3)) == []
    whole = with_layers(layer("", 1.0), layer("a", 1.0))
    moved = compare_fingerprints(whole, with_layers(layer("", 1.0), layer("a", 1.5)))  # the next module makes up for it
    assert moved.strong == ()
    assert strong(layer("a", 1.5), layer("b", 1.0), weights={"a": "2e", "conv": "1f"}) == []
    assert strong(layer("a", 1.005), layer("b", 1.0)) == []
    assert strong(layer("a", 1.03), layer("b", 1.0), settings={"precision": "bf16-mixed"}) == []
    assert strong(layer("a", math.nan), layer("b", math.nan, math.nan)) == ["a"]


def test_collapse_in_training_is_the_pipelines_where_modes_differ() -> None:
    """A backbone in train mode that the float run froze: no hyperparameter does it."""
    frozen = dataclasses.replace(HERE, modes={"eval": ["backbone.bn"]})
    result = judged(frozen, HERE, float_finetune=trained(0.2))
    assert (result.verdict, result.rung) == ("pipeline misaligned", 5)
    assert "in eval mode while training, only in the reference: backbone.bn" in result.cause
    assert "hyperparameters" not in result.note.partition(":")[0]
    hotter: dict[str, Any] = {"optimizers": [{"class": "Adam", "groups": [{"lr": 0.1}]}]}
    colder: dict[str, Any] = {"optimizers": [{"class": "Adam", "groups": [{"lr": 0.01}]}]}
    both = judged(
        dataclasses.replace(frozen, **colder), dataclasses.replace(HERE, **hotter), float_finetune=trained(0.2)
    )
    assert both.verdict == "hyperparameters"  # the learning rate speaks against itself as well


def test_batch_size_is_named_before_the_loss_that_follows_from_it() -> None:
    """Batches of one: batch norm moves, and the loss in train mode differs."""
    losses = {"train_loss (batch norm in eval)": 0.05, "train_loss (batch norm in train)": 0.05}
    reference = dataclasses.replace(HERE, losses=losses, settings={"batch_size": 64})
    here = dataclasses.replace(
        HERE, losses=losses | {"train_loss (batch norm in train)": 3.0}, settings={"batch_size": 1}
    )
    result = judged(reference, here, batch_norm_moving=finetune(0.2))
    assert (result.rung, result.cause) == (3, "settings batch_size: 64 -> 1")


HARMLESS: dict[str, nn.Module] = {
    "criterion": nn.CrossEntropyLoss(),
    "triplet": nn.TripletMarginLoss(),  # its p is a norm
    "act": nn.ReLU(),
    "last": nn.Identity(),
    "off": nn.Dropout(0.0),
}


def with_modules(optimizer: str, *names: str, **modules: nn.Module) -> Fingerprint:
    """A run with this optimizer and these modules beside the usual layer."""
    present = {name: HARMLESS[name] for name in names} | modules
    own = {name: found for name, found in module_settings(nn.ModuleDict(present)).items() if name}
    optimizers = [{"class": optimizer, "groups": [{"lr": 0.001}]}]
    return dataclasses.replace(with_layers(layer("conv", 1.0)), modules=own, optimizers=optimizers)


@pytest.mark.parametrize("names", [*([name] for name in HARMLESS), list(HARMLESS)])
def test_module_that_does_nothing_is_named_in_the_table_and_not_as_the_cause(names: list[str]) -> None:
    """A criterion as a module, in the QAT code only: the other optimizer is the likelier cause.

    Siblings: activations and Identity, dropout that drops nothing, losses with a setting named p; and the same in the
    float code only. What such a module computes shows in layers and losses.
    """
    for one, other, where in (([], names, "here"), (names, [], "in the reference")):
        result = judged(with_modules("Adam", *one), with_modules("SGD", *other), float_finetune=trained(0.2))
        assert (result.verdict, result.rung) == ("hyperparameters", 5)
        assert result.cause == "optimizer class Adam -> SGD"
        (row,) = (row for row in result.differences.rows if "exist only" in row.what)
        assert f"modules that exist only {where}: {names[0]} (" in row.what
        same = judged(with_modules("Adam", *one), with_modules("Adam", *other), float_finetune=trained(0.2))
        assert not same.cause


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropout_that_only_one_run_has_is_named_as_the_cause(kind: type[nn.Module]) -> None:
    """It acts only in training, so nothing else shows it; also beside a criterion that does nothing."""
    here = with_modules("SGD", "criterion", drop=kind(0.9))  # type: ignore[call-arg]
    result = judged(with_modules("Adam"), here, float_finetune=trained(0.2))
    assert result.cause == f"modules that exist only here: drop ({kind.__name__})"


def test_criterion_that_only_one_run_has_does_not_silence_the_guess_at_its_loss() -> None:
    losses = {"train_loss (batch norm in eval)": 0.15}
    here = dataclasses.replace(with_modules("Adam", "criterion"), losses=losses)
    result = judged(with_modules("Adam"), here)
    assert (result.verdict, result.rung) == ("pipeline misaligned", 2)
    assert "scaled by 3?" in result.cause
