"""A run with what its page says about it as a whole and about every point."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qat.reporting.html.overview import Overview, judge_run
from lightning_qat.reporting.html.point_causes import with_causes
from lightning_qat.reporting.html.point_table import PointTable, point_table
from lightning_qat.reporting.html.run_folder import RunFolder


@dataclass(frozen=True)
class JudgedRun:
    """A run, judged once for all parts of a page.

    Args:
        run: its files, with causes.
        overview: what it comes to.
        points: its points.
    """

    run: RunFolder
    overview: Overview
    points: PointTable

    @classmethod
    def of(cls, run: RunFolder) -> JudgedRun:
        """Judge a run.

        Args:
            run: its files, as they were read.
        """
        run = with_causes(run)
        return cls(run, judge_run(run), point_table(run))
