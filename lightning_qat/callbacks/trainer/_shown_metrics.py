"""What ``trainer.callback_metrics`` and its siblings show while evaluation steps run outside of Lightning's loops.

Private Lightning names, as in ``_compat.py``: the results of the evaluation loop, and the connector that shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl

from lightning_qat.callbacks.trainer._compat import ResultCollection


class ShownMetrics:
    """Lets the trainer show the metrics of an evaluation at the moments at which Lightning's evaluation loop does.

    Args:
        trainer: the running trainer, whose metrics the caller puts back, see ``_compat.preserved_trainer``.
        results: what the steps log to.
    """

    def __init__(self, trainer: pl.Trainer, results: ResultCollection) -> None:
        self._connector = trainer._logger_connector
        self._trainer = trainer
        self._results = results

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Stand in for the evaluation loop; a run of predictions has none."""
        connector = self._connector
        try:
            loop = self._trainer._evaluation_loop
        except RuntimeError:
            yield
            return
        before = loop._results, connector._first_loop_iter, connector._current_fx
        loop._results, connector._first_loop_iter = self._results, None
        try:
            yield
        finally:
            loop._results, connector._first_loop_iter, connector._current_fx = before

    def begin_batch(self) -> None:
        """What is logged now is shown with the values of the batch."""
        self._connector._first_loop_iter = True

    def end_batch(self) -> None:
        """Keep the values of the batch."""
        self._show(on_step=True)

    def end_loader(self) -> None:
        """Show the values of the epoch so far."""
        self._connector._first_loop_iter = None
        self._show(on_step=False)

    def _show(self, on_step: bool) -> None:
        metrics, connector = self._results.metrics(on_step), self._connector
        connector._progress_bar_metrics.update(metrics["pbar"])
        connector._callback_metrics.update(metrics["callback"])
        connector._logged_metrics.update(metrics["log"])
