"""What `mixed_precision.md` is made of, and its claim on the model that is trained fastest."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from tests.zoo import mixed_models
from tests.zoo.mixed_models import (
    INSTALL,
    INSTALL_MNIST,
    MissingPackageError,
    Subject,
    efficientnet_on_mnist,
    sentence_encoder,
    train_all,
    vit,
    with_new_head,
)
from tests.zoo.mixed_precision import (
    AIM,
    FILE,
    OURS,
    OUTPUT,
    OWN,
    SHARE,
    Quality,
    Row,
    line,
    measure,
    qualities,
    stored,
    summary,
)
from tests.zoo.models import efficientnet_lite0

pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")

PLANS = {
    "float": Quality(0.0, 0.9),
    "int8": Quality(1.1, 0.5),
    "int16": Quality(0.1, 0.9),
    OURS: Quality(0.3, 0.88),
    OWN: Quality(0.6, 0.7),
    OUTPUT: Quality(0.4, 0.9, 0.007),
}
ROW = Row("A", "accuracy", 50, 5, 9, 0.8, 11.0, PLANS, None, 1.0)


def test_shares_of_a_row() -> None:
    assert ROW.won_back(OURS) == pytest.approx(0.8)
    assert ROW.task_won_back(OURS) == pytest.approx(0.95)
    assert ROW.sqnr("int8") == pytest.approx(10.0)
    unharmed = dataclasses.replace(ROW, plans={**PLANS, "int8": Quality(1.1, 0.9)})
    assert unharmed.task_won_back(OURS) is None
    assert "int8 loses less than 0.005" in line(unharmed)


def test_summary_says_what_is_missed_and_what_is_better() -> None:
    worse = dataclasses.replace(ROW, model="B", plans={**PLANS, OURS: Quality(0.5, 0.6)})
    text = summary([ROW, worse])
    assert "in 1 of 2 models: A." in text
    assert "B 18%" in text
    assert "B (by the SQNR of the model)" in text
    assert "A (by the SQNR of the model, task: by 0.0200 ± 0.0070)" in text
    good = dataclasses.replace(ROW, plans={**PLANS, OUTPUT: Quality(0.4, 0.6)})
    assert "Neither order of layers is better" in summary([good])


@pytest.mark.parametrize(
    ("name", "make", "way"),
    [("ENCODER", sentence_encoder, INSTALL), ("MNIST", efficientnet_on_mnist, INSTALL_MNIST)],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[], Subject], way: str
) -> None:
    """Weights and images."""
    monkeypatch.setattr(mixed_models, name, "no_such_package")
    assert importlib.util.find_spec("no_such_package") is None
    with pytest.raises(MissingPackageError, match=f"are not installed: {way}$"):
        make()


def test_rows_are_kept(tmp_path: Path) -> None:
    """With a prediction and without: what was written is what is read."""
    rows = [ROW, dataclasses.replace(ROW, model="B", prediction=(0.98, 0.1))]
    file = tmp_path / "rows.jsonl"
    assert stored(file) == stored(None) == []
    file.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    assert stored(file) == rows


def test_a_new_head_on_frozen_weights_is_the_logistic_regression_of_its_features() -> None:
    """On scikit-learn's digits: classes and accuracy are those that scikit-learn itself gives for the features."""
    found = load_digits()
    images, labels = torch.from_numpy(found.images[:150]).float()[:, None] / 16, torch.from_numpy(found.target[:150])
    subject = with_new_head(images, labels, seen=100, size=25)
    features: list[Tensor] = []
    handle = subject.model._fc.register_forward_hook(lambda _, args, __: features.append(args[0]))
    with torch.no_grad():
        seen = [subject.model(**batch) for batch in subject.calibration]
        outputs = torch.cat([subject.model(**batch) for batch in subject.held_out])
    handle.remove()
    assert torch.equal(torch.cat(subject.labels), labels[:100])
    assert [len(part) for part in seen] == [25] * 4
    assert len(outputs) == 50
    known, new = torch.cat(features[:4]).double().numpy(), torch.cat(features[4:]).double().numpy()
    regression = LogisticRegression(max_iter=1000).fit(known, found.target[:100])
    np.testing.assert_allclose(outputs.numpy(), regression.decision_function(new), atol=1e-3)
    assert subject.quality(outputs, outputs) == regression.score(new, found.target[100:150]) > 0.7
    fresh = efficientnet_lite0().state_dict()
    assert all(
        torch.equal(value, fresh[name]) for name, value in subject.model.state_dict().items() if "_fc" not in name
    )


def test_training_all_weights_lowers_the_loss_and_leaves_batch_norms_statistics() -> None:
    """On two batches of scikit-learn's digits."""
    found = load_digits()
    images, labels = torch.from_numpy(found.images[:75]).float()[:, None] / 16, torch.from_numpy(found.target[:75])
    subject = with_new_head(images, labels, seen=50, size=25, labelled=2)
    model, before = subject.model, {name: b.clone() for name, b in subject.model.named_buffers()}

    def loss() -> float:
        with torch.no_grad():
            outputs = torch.cat([model(**batch) for batch in subject.calibration])
        return float(torch.nn.functional.cross_entropy(outputs, labels[:50]))

    nn.init.zeros_(model._fc.weight)  # the fitted head leaves nothing to learn
    nn.init.zeros_(model._fc.bias)
    stem = model._conv_stem.weight.clone()
    assert loss() == pytest.approx(math.log(10))
    train_all(model, subject.calibration, subject.labels, epochs=2)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not torch.equal(model._conv_stem.weight, stem)
    assert loss() < math.log(10) - 0.1


def test_the_standard_error_is_that_of_paired_samples() -> None:
    """Against scipy's, for hits of two plans on the same samples."""
    ours, other = (torch.rand(200, generator=torch.Generator().manual_seed(seed)).round().double() for seed in (0, 1))
    subject = Subject(nn.Identity(), [], [], "", "accuracy", lambda outputs, _: outputs)
    found = qualities(subject, {"float": torch.ones(200).double(), OURS: ours, OWN: other})
    assert found[OWN].uncertain == pytest.approx(scipy.stats.sem((other - ours).numpy()))
    assert found[OWN].task == pytest.approx(float(other.mean()))
    assert found[OURS].uncertain == 0.0


def test_the_table_is_there_and_complete() -> None:
    text = FILE.read_text()
    assert all(f"| {name} |" in text for name in mixed_models.SUBJECTS)


@pytest.mark.full
def test_a_tenth_of_the_points_wins_back_more_than_layers_do() -> None:
    """ViT on digits: real plans on digits that neither calibration nor choice has seen."""
    row = measure("ViT", vit, 0)
    assert row.raised <= SHARE * row.points
    assert row.won_back(OURS) >= max(row.won_back(OWN), row.won_back(OUTPUT))
    assert abs(row.won_back(OURS) - row.predicted) < 0.15
    assert row.enough > row.raised or row.won_back(OURS) > AIM - 0.15
