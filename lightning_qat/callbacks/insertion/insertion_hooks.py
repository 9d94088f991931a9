"""Inserting fake-quant at the one moment that works: after the layers exist, before weights are loaded.

``Callback.setup`` is too early for layers built in ``configure_model``, and no callback hook follows it. So the module
gets an instance-level ``configure_model`` that calls the original and inserts, and an instance-level
``on_load_checkpoint`` that looks at the checkpoint before it is loaded; both are taken off in teardown.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.callbacks.insertion.float_checkpoint import FloatCheckpointError
from lightning_qat.callbacks.insertion.init_modes import without_init_modes
from lightning_qat.callbacks.insertion.insertion_request import InsertionRequest, differences
from lightning_qat.callbacks.insertion.quantized_checkpoint import region_prefix, stored_regions, stored_target
from lightning_qat.callbacks.insertion.setup_copies import renew_model_copies
from lightning_qat.callbacks.insertion.target_discovery import AUTO
from lightning_qat.callbacks.insertion.traced_targets import (
    format_targets,
    graphs_of_rank_zero,
    traced_targets,
)
from lightning_qat.callbacks.schedule.rank_averaging import hide_from_ddp, show_to_ddp
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.messages import rank_zero_info, rank_zero_warn
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.quantization.errors import SensitivityTableError, TracingError
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.make_plan import make_plans
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.planning.sensitivity_rules import plain_rules
from lightning_qat.quantization.region.insertion import attach
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.region.stored_state import read_region
from lightning_qat.quantization.tracing.op_graph import OpGraph


class InsertionHooks:
    """Owns the two instance-level hooks of one run.

    Args:
        request: what to insert.
        trainer: the running trainer.
        pl_module: where to insert.
    """

    def __init__(self, request: InsertionRequest, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.request = request
        self.trainer = trainer
        self.pl_module = pl_module
        self._before: dict[str, Any] = {}
        self._inserted = False
        self._pending: MisconfigurationException | None = None

    def install(self) -> None:
        """Put the hooks on the module. Plain functions without ``__wrapped__``: Lightning looks behind wrappers."""
        original_configure, original_load = self.pl_module.configure_model, self.pl_module.on_load_checkpoint

        def configure_model() -> None:
            original_configure()
            with without_init_modes(self.trainer.strategy.root_device):
                self.insert()
            self.request.frozen_parts.apply(self.pl_module, self.trainer.current_epoch)
            self._hide_learned_scales()
            renew_model_copies(self.trainer, self.pl_module)

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            original_load(checkpoint)
            self.check_checkpoint(checkpoint)
            self.request.frozen_parts.apply(self.pl_module, self.trainer.current_epoch)
            self._hide_learned_scales()
            renew_model_copies(self.trainer, self.pl_module)

        for hook in (configure_model, on_load_checkpoint):
            self._before[hook.__name__] = self.pl_module.__dict__.get(hook.__name__)
            self.pl_module.__dict__[hook.__name__] = hook

    def uninstall(self) -> None:
        """Take the hooks off."""
        show_to_ddp(self.pl_module)
        for name, previous in self._before.items():
            if previous is None:
                self.pl_module.__dict__.pop(name, None)
            else:
                self.pl_module.__dict__[name] = previous
        self._before = {}

    def raise_pending_error(self) -> None:
        """Raise the error that kept fake-quant from being inserted, unless a checkpoint has brought a plan since."""
        if self._pending is not None:
            raise self._pending

    def insert(self) -> None:
        """Load the initial weights, learn the ops and insert; a module with calibrated fake-quants keeps them."""
        if self._inserted:  # WeightAveraging calls configure_model before the Trainer does
            return
        regions = find_regions(self.pl_module)
        if any(region.is_calibrated for region in regions.values()):
            self._keep(regions)
            return
        for region in regions.values():  # left by a run that ended before calibration
            region.remove()
        self._pending = None  # of an earlier call, before there were layers
        _compat.convert_early(self.trainer, self.pl_module)
        graphs: dict[str, OpGraph] = {}
        rules: list[Override] = []
        try:
            self.request.initial_weights.load(self.pl_module)
            graphs = traced_targets(
                self.trainer,
                self.pl_module,
                self.request.target,
                self.request.trace_batches,
                self.request.train_mode,
            )
            rules, notes = plain_rules(self.request.overrides, graphs)
            for note in notes:
                rank_zero_info(f"QuantizationAwareTraining: {note}")
        except (TracingError, FileNotFoundError, FloatCheckpointError, SensitivityTableError) as error:
            # a checkpoint may still bring weights and a plan
            self._pending = MisconfigurationException(str(error))
            self._pending.__cause__ = error
        if not self._all_ranks_ready():
            return
        graphs = graphs_of_rank_zero(self.trainer, graphs)
        with misconfiguration():
            plans = make_plans(graphs, self.request.qconfig, rules, self.request.profile)
            for path, graph in graphs.items():
                attach(self.pl_module.get_submodule(path), graph, plans[path])
        for region in find_regions(self.pl_module).values():
            region.learn_scales(self.request.learned_scales)
        self._inserted = True

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the plan of a checkpoint before its weights are loaded, whether or not the module was traced."""
        stored = stored_regions(checkpoint["state_dict"])
        if not stored:
            raise MisconfigurationException(
                "ckpt_path is a float checkpoint, and QuantizationAwareTraining is in the list of callbacks. To start "
                'QAT from it, write QuantizationAwareTraining(init_from="<that path>") and leave ckpt_path empty: '
                "weights are loaded, loops and optimizer start fresh."
            )
        regions = find_regions(self.pl_module)
        with misconfiguration():
            # before anything of the model is changed
            read = {path: read_region(checkpoint["state_dict"], region_prefix(path)) for path in stored}
            if self._pending is not None:
                self._insert_stored(read)
                self._pending = None
            elif set(stored) != set(regions) and self.request.target == AUTO:
                # the steps of this stage call other modules than those of training did
                for region in regions.values():
                    region.remove()
                self._insert_stored(read)
            elif set(stored) != set(regions):
                raise MisconfigurationException(
                    f"the checkpoint has fake-quants on {format_targets(stored)}, this run puts them on "
                    f"{format_targets(regions)}: set target: {format_targets(stored)} in QuantizationAwareTraining."
                )
            for path, region in find_regions(self.pl_module).items():
                region.reader.take(stored[path], *read[path])
                region.set_extra_state(stored[path])
            self._warn_about_learned_scales()
        self._inserted = True
        if self.request.initial_weights.path is not None:
            rank_zero_info(
                "QuantizationAwareTraining: ckpt_path brings the weights, so those of init_from are not used."
            )
        self._warn_about_differences(
            "the checkpoint was made with", next(iter(find_regions(self.pl_module).values())).plan
        )

    def _insert_stored(self, read: dict[str, tuple[OpGraph, QuantPlan]]) -> None:
        """Insert the plan of a checkpoint without a trace: the code is checked while it runs."""
        for path, (graph, plan) in read.items():
            attach(stored_target(self.pl_module, path), graph, plan, traced=False)

    def _keep(self, regions: dict[str, Region]) -> None:
        """Keep the fake-quants of a module that an earlier run (or insert()) has quantized."""
        self._inserted, initial = True, self.request.initial_weights
        if self.trainer.state.fn == "fit":
            for region in regions.values():
                region.learn_scales(self.request.learned_scales)
        if initial.path is not None and not initial.were_loaded_into(self.pl_module):
            rank_zero_warn(
                f"{type(self.pl_module).__name__} has calibrated fake-quants already, so init_from is not used: to "
                "start from the float checkpoint, create the module anew."
            )
        self._warn_about_differences("the module was quantized with", next(iter(regions.values())).plan)

    def _warn_about_differences(self, what: str, plan: QuantPlan) -> None:
        """Warn that an older plan wins over the configuration of this run."""
        lines = differences(plan, self.request)
        if lines:
            rank_zero_warn(
                f"{what} another configuration than this run's, and keeps it ({'; '.join(lines)}). To apply this "
                'run\'s, start from the float checkpoint: QuantizationAwareTraining(init_from="float.ckpt") without '
                "ckpt_path, and calibrate anew."
            )

    def _warn_about_learned_scales(self) -> None:
        """Warn that a resumed run learns the same scales as before: they are in its optimizer state."""
        learned: dict[str, set[bool]] = {}
        for region in find_regions(self.pl_module).values():
            points = region.points
            for point in region.plan.points:
                if point.fixed_scale is None:
                    role = point.scale_role
                    learned.setdefault(role, set()).add(points[point.name].learned)
        found = {role for role, kinds in learned.items() if True in kinds}
        wanted = set(self.request.learned_scales) & set(learned)
        if self.trainer.state.fn == "fit" and found != wanted:
            rank_zero_warn(
                f"the checkpoint was made with learned scales for {sorted(found) or 'nothing'}, this run asks for "
                f"{sorted(wanted) or 'nothing'}; it goes on as it was. To change it, fit without ckpt_path: "
                "trainer.fit(lightning_qat.load_quantized(MyModule, path))."
            )

    def _hide_learned_scales(self) -> None:
        if self.trainer.world_size > 1:
            hide_from_ddp(self.pl_module)

    def _all_ranks_ready(self) -> bool:
        """Whether every rank has a graph. Otherwise no rank inserts, and all wait for a checkpoint."""
        if self.trainer.world_size == 1:
            return self._pending is None
        ready = self.trainer.strategy.reduce_boolean_decision(self._pending is None, all=True)
        if not ready and self._pending is None:
            self._pending = MisconfigurationException("another rank could not trace the module: see its error.")
        return ready
