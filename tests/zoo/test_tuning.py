"""What `tuning.md` is made of, and a shorter tuning of the sentence encoder from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.zoo.mixed_models import ENCODER, INSTALL
from tests.zoo.tuning import FILE, METRIC, Tuned, page, tuned


def found(reproduced: float) -> Tuned:
    rows = [{"metric": METRIC, "float": 0.6, "mixed QAT 3": 0.5}]
    return Tuned({"rows": rows, "recommended": "mixed QAT 3"}, "| stage |", {"float": 9.6}, reproduced)


def test_the_page_says_whether_the_accuracy_is_reproduced() -> None:
    assert f"ends with {METRIC} 0.5000: the same as in the table" in page(found(0.5))
    assert f"ends with {METRIC} 0.4900: not the same as in the table" in page(found(0.49))
    assert "float 10." in page(found(0.5))


def test_the_table_is_there_and_says_that_the_target_is_met() -> None:
    text = FILE.read_text()
    assert "target met: " in text
    assert ": the same as in the table" in text


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_sentence_encoder_is_tuned_unattended(tmp_path: Path) -> None:
    """int8 and int16, with less data and without the trainings at one type: the share is found, and reproduced."""
    pytest.importorskip(ENCODER, reason=f"its weights are no extra: {INSTALL}")
    short = ["--data.train_pairs", "96"]
    result = tuned(tmp_path, ["--skip", "wide QAT", "--skip", "narrow QAT"], short)
    row = next(row for row in result.result["rows"] if row["metric"] == METRIC)
    assert row["narrow calibrated"] < row["target"] <= result.recommended
    assert 0 < len(result.result["raised"]) < result.result["points"]
    if "QAT" in result.result["recommended"]:
        assert result.reproduced == pytest.approx(result.recommended, abs=1e-6)
    else:  # fit trains what was calibrated only; the note says so
        assert "by calibration alone" in result.report
        assert result.reproduced >= row["target"]
