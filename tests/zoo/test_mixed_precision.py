"""What `mixed_precision.md` is made of, and its claim on the model that is trained fastest."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from tests.zoo import mixed_models
from tests.zoo.mixed_models import INSTALL, MissingPackageError, sentence_encoder, vit
from tests.zoo.mixed_precision import AIM, FILE, OURS, OUTPUT, OWN, SHARE, Quality, Row, line, measure, summary

pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")

PLANS = {
    "float": Quality(0.0, 0.9),
    "int8": Quality(1.1, 0.5),
    "int16": Quality(0.1, 0.9),
    OURS: Quality(0.3, 0.88),
    OWN: Quality(0.6, 0.7),
    OUTPUT: Quality(0.4, 0.9),
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
    assert "A (by the SQNR of the model, task)" in text
    good = dataclasses.replace(ROW, plans={**PLANS, OUTPUT: Quality(0.4, 0.6)})
    assert "Neither order of layers is better" in summary([good])


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_models, "ENCODER", "no_such_package_of_weights")
    assert importlib.util.find_spec("no_such_package_of_weights") is None
    with pytest.raises(MissingPackageError, match=f"its weights are not installed: {INSTALL}"):
        sentence_encoder()


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
