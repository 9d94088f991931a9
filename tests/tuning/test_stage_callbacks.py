"""What a stage makes of the callbacks of the user's run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lightning_qat.tuning.stage_callbacks import configure
from lightning_qat.tuning.stage_request import StageRequest
from lightning_qat.tuning.tuning_settings import TuningSettings
from tests.harness.trainers import qat_trainer


def test_a_sensitivity_table_is_one_of_the_inputs_of_a_stage(tmp_path: Path) -> None:
    """A stage rests on all files that its run reads: float weights and tables. If one changes, the stage is refused."""
    table, weights = tmp_path / "sensitivity.csv", tmp_path / "float.ckpt"
    table.write_text("point,score\nconv1.output,1\n")
    weights.write_bytes(b"weights")
    rule = {"sensitivity": str(table), "top": 1, "activation": {"dtype": "int12"}}
    run = qat_trainer(tmp_path, qat={"overrides": [rule], "init_from": str(weights)})
    request = StageRequest("s", "train", "int8", ("fc.weight",), str(tmp_path), TuningSettings(None, ()))
    configured = configure(run, request, {})
    assert configured.inputs == {
        str(path.resolve()): hashlib.sha256(path.read_bytes()).hexdigest() for path in (table, weights)
    }
    assert [o.label for o in configured.quantization.overrides] == [
        f"sensitivity {str(table)!r}, top 1",
        "match 'fc.weight'",
    ]
