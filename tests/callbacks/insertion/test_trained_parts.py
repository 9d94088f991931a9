"""`target: auto` takes the model that is trained, and says what it leaves out.

Siblings that stand beside the model: a frozen teacher, one under no_grad, one that no optimizer has, a moving average
of the weights, a network for a perceptual loss. Siblings that belong to it: a frozen backbone, a frozen embedding, a
frozen decoder, a backbone whose head is a parameter of the module, a critic that is trained.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.callbacks.insertion.module_flow import ModuleFlow
from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, Net, loader
from tests.harness.trainers import qat_trainer


def body() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU())


class Steps(Classifier):
    """Training and validation run the same loss of `parts`."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def optimized(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.optimized(), 0.05)


class Distillation(Steps):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.student, self.teacher, self.how = Net(), Net(), how
        if how in ("frozen", "average"):
            self.teacher.requires_grad_(False)

    def optimized(self) -> list[nn.Parameter]:
        """Careless scripts give the optimizer everything."""
        return list(self.student.parameters() if self.how == "detached" else self.parameters())

    def loss(self, batch: Any) -> Tensor:
        logits = self.student(batch[0])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            expected = self.teacher(batch[0]).detach()
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, expected)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.how == "average":
            for mine, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.data.lerp_(other.data, 0.1)


class Perceptual(Steps):
    """The network of the loss sees the output and, without a model in between, what it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Conv2d(1, 1, 3, padding=1)
        self.features = nn.Conv2d(1, 4, 3).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        return F.l1_loss(self.features(self.student(batch[0])), self.features(batch[0]))


BESIDE = {
    "frozen": (lambda: Distillation("frozen"), "teacher", "none of its parameters requires a gradient"),
    "no_grad": (lambda: Distillation("no_grad"), "teacher", "training calls it under no_grad"),
    "detached": (lambda: Distillation("detached"), "teacher", "none of its parameters is in an optimizer"),
    "average": (lambda: Distillation("average"), "teacher", "none of its parameters requires a gradient"),
    "perceptual": (Perceptual, "features", "none of its parameters requires a gradient"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_the_model_stays_float_and_is_named_once(tmp_path: Path, case: str) -> None:
    make, name, reason = BESIDE[case]
    module = make()
    before = copy.deepcopy(module.get_submodule(name).state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qat_trainer(tmp_path, limit_train_batches=2).fit(module)
    said = [str(w.message) for w in caught if issubclass(w.category, PossibleUserWarning) and "auto" in str(w.message)]
    assert len(said) == 1
    assert f"leaves '{name}' out, which stays float: {reason}" in said[0]
    assert f"write target: ['student', '{name}']" in said[0]
    assert list(find_regions(module)) == ["student"]
    if case != "average":
        after = module.get_submodule(name).state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before if "weight" in key)


def test_a_target_that_is_named_is_taken_without_a_word(tmp_path: Path) -> None:
    module = Distillation("frozen")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*target:.*")
        qat_trainer(tmp_path, qat={"target": ["student", "teacher"]}, fast_dev_run=True).fit(module)
    assert list(find_regions(module)) == ["student", "teacher"]


def test_a_run_that_only_evaluates_leaves_out_the_same(tmp_path: Path) -> None:
    module = Distillation("frozen")
    with pytest.warns(PossibleUserWarning, match="auto leaves 'teacher' out"):
        qat_trainer(tmp_path).validate(module, loader(), verbose=False)
    assert list(find_regions(module)) == ["student"]


class Chain(Steps):
    """One part is frozen, and works together with the other: it is part of what is deployed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = body(), nn.Linear(4, 4), how
        (self.second if how == "decoder" else self.first).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            features = self.first(batch[0]).mul(2.0).view(-1, 4)
        padded = torch.zeros_like(features)
        padded[:, :2] = features[:, :2]
        return F.cross_entropy(self.second(padded), batch[1])


class OwnHead(Steps):
    """The head of the frozen backbone is a parameter of the module; another part is trained beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = body().requires_grad_(False), nn.Linear(36, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def loss(self, batch: Any) -> Tensor:
        logits = F.linear(self.first(batch[0]), self.weight) + self.second(batch[0].flatten(1))
        return F.cross_entropy(logits, batch[1])


class FrozenEmbedding(Steps):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(3, 4).requires_grad_(False), nn.Linear(4, 4)

    def loss(self, batch: Any) -> Tensor:
        tokens = (batch[0].flatten(1) > 0).long()
        return F.cross_entropy(self.second(self.first(tokens).mean(1)), batch[1])


class Critic(Steps):
    """Both are trained; the critic sees only what is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = body(), nn.Linear(4, 1)

    def loss(self, batch: Any) -> Tensor:
        made = self.first(batch[0])
        return F.cross_entropy(made, batch[1]) + self.second(made.detach()).pow(2).mean()


class AllFrozen(Steps):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net().requires_grad_(False), Net().requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(4))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.first(batch[0]) + self.second(batch[0]) + self.shift, batch[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain("backbone"),
        lambda: Chain("no_grad"),
        lambda: Chain("decoder"),
        OwnHead,
        FrozenEmbedding,
        Critic,
        AllFrozen,
    ],
)
def test_what_belongs_to_the_model_is_taken_whether_or_not_it_is_trained(tmp_path: Path, make: Any) -> None:
    module = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*target:.*")
        qat_trainer(tmp_path, fast_dev_run=True).fit(module)
    assert list(find_regions(module)) == ["first", "second"]


def test_a_frozen_decoder_is_taken_where_the_module_has_an_example_input_too(tmp_path: Path) -> None:
    """The example's forward runs only where the steps called nothing: it says nothing of what trains."""
    module = Chain("decoder")
    module.example_input_array = torch.randn(2, 1, 6, 6)
    qat_trainer(tmp_path, fast_dev_run=True).fit(module)
    assert list(find_regions(module)) == ["first", "second"]


def test_configure_optimizers_is_not_called_ahead_of_time_where_the_loss_tells_what_is_trained(tmp_path: Path) -> None:
    calls = []

    class Counting(Chain):
        def configure_optimizers(self) -> Any:
            calls.append(self.trainer.state.fn)
            return super().configure_optimizers()

    qat_trainer(tmp_path, fast_dev_run=True).fit(Counting("backbone"))
    assert len(calls) == 1


def test_flow_is_followed_through_writes_views_and_containers() -> None:
    first, second, third = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    flow = ModuleFlow({"first": first, "second": second, "third": third}, set())
    with flow.watching():
        x = torch.ones(1, 2)
        made = {"rows": [first(x)]}
        into = torch.zeros(1, 2)
        into[0] = made["rows"][0][0]
        second(into)
        third(x)
    assert flow.inputs == {"first": [frozenset()], "second": [frozenset({"first"})], "third": [frozenset()]}
    assert first(torch.ones(1, 2)).shape == (1, 2)
    assert "forward" not in vars(first)


# -- inside of the target


class Inside(Steps):
    """The forward calls all of it, so the whole module is the target."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.student, self.other, self.how = body(), body(), how
        self.head = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        if how != "no_grad":
            self.other.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == "backbone":  # also through a module in a list
            return self.head(self.blocks[0](self.other(images)) + self.student(images)), images
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            other = self.other(images)
        features = self.blocks[0](self.student(images))
        if self.how == "branch":
            return self.head(features) + other, images
        return self.head(features), other

    def loss(self, batch: Any) -> Tensor:
        logits, other = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss + F.mse_loss(logits, other.detach()) if other.shape == logits.shape else loss


class Wrapped(Steps):
    """The target is a module that calls one module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Inside("frozen")

    def loss(self, batch: Any) -> Tensor:
        logits, other = self.net(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(logits, other)


def said_of_helpers(directory: Path, module: Classifier, **qat: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qat_trainer(directory, limit_train_batches=2, qat=qat).fit(module)
    return [str(w.message) for w in caught if "is quantized, as" in str(w.message)]


@pytest.mark.parametrize("how", ["no_grad", "frozen", "wrapped"])
def test_a_teacher_inside_of_the_target_is_said_loudly_and_stays_float_as_advised(tmp_path: Path, how: str) -> None:
    def make() -> Classifier:
        return Wrapped() if how == "wrapped" else Inside(how)

    path = "net.other" if how == "wrapped" else "other"
    module = make()
    (said,) = said_of_helpers(tmp_path, module)
    ((target, region),) = find_regions(module).items()
    assert said.startswith(f"{path!r} is quantized, as")
    assert any(name.startswith("other") for name in region.points)
    advice = said[said.index("overrides: ") + len("overrides: ") : said.index(". If it is deployed")]
    module = make()
    said_of_helpers(tmp_path, module, overrides=yaml.safe_load(advice))
    (region,) = find_regions(module).values()
    assert not any(name.startswith("other") for name in region.points)
    assert any(name.startswith("student") for name in region.points)
    assert not said_of_helpers(tmp_path, make(), target=[target])


@pytest.mark.parametrize("how", ["backbone", "branch"])
def test_a_frozen_part_that_the_model_needs_is_not_mentioned(tmp_path: Path, how: str) -> None:
    """A backbone, and a branch whose result is added to what is trained."""
    assert not said_of_helpers(tmp_path, Inside(how))


class LossBeside(Inside):
    """The step calls a frozen loss network beside the target, so it is not quantized."""

    def __init__(self) -> None:
        super().__init__("backbone")
        self.features = nn.Linear(4, 4).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.0 * self.features(batch[0].flatten(1)[:, :4]).square().mean()


def test_a_loss_network_beside_the_target_is_not_mentioned(tmp_path: Path) -> None:
    module = LossBeside()
    assert not said_of_helpers(tmp_path, module)
    (region,) = find_regions(module).values()
    assert not any(name.startswith("features") for name in region.points)


class OnlyInTraining(Inside):
    """Evaluation does not call the teacher, so that it stays float by itself."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.blocks[0](self.student(images)))
        return logits, self.other(images) if self.training else images


def test_a_teacher_that_only_training_calls_is_not_mentioned(tmp_path: Path) -> None:
    module = OnlyInTraining("frozen")
    assert not said_of_helpers(tmp_path, module)
    (region,) = find_regions(module).values()
    assert not any(name.startswith("other") for name in region.points)
