"""Three runs from training to the page: what a reader without experience has to find is on the first screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.parsed_page import ParsedPage
from tests.reporting.html.prepared_runs import CLIPPED, prepare


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_first_screen_says_what_is_wrong_what_to_do_and_which_points(tmp_path: Path) -> None:
    first = {}
    for name, path in prepare(tmp_path).items():
        text = ParsedPage(path.read_text()).text.partition(" Glossary ")[2]  # behind the list of sections
        first[name] = text.partition(" All points ")[0]
    misaligned, clipped, healthy = (first[name] for name in ("misaligned", "clipped", "healthy"))
    assert "pipeline misaligned" in misaligned
    assert "normalization missing here" in misaligned
    assert "normalized_in_training: True -> False" in misaligned.partition(" Findings ")[0]
    assert "Look at these points first" not in misaligned
    assert "Points: none is to blame" in misaligned
    assert "quantization error" in clipped
    assert f"Next {CLIPPED}: Its fixed scale is too small" in clipped
    assert "It stands in override 1" in clipped
    assert "to int16" not in clipped
    assert f"Look at these points first: {CLIPPED}" in clipped
    assert "target reached" in healthy
    assert "Nothing has to be mended" in healthy
    assert "Points: none has to be changed" in healthy
    assert "Calibration alone reaches it too" in healthy
    assert "warning" not in healthy
