"""Record the calls that the steps of a module make to its submodules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_qat.callbacks.trainer.messages import rank_zero_warn
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.preservation import replaced_attribute
from lightning_qat.quantization.modules.tensor_leaves import leaves


class CallRecorder:
    """Wraps the forward of every module while steps run, and keeps outermost (or wanted) calls with their modes.

    Args:
        modules: the module and its submodules by path.
        wanted: paths whose calls are kept; None for the outermost calls.

    Attributes:
        stage: which step runs, set by the user of the recorder.
        decides: whether the steps that run now count for the choice of targets; those of calibration do not.
        calls: the calls that were kept, by path.
        outermost: paths of the outermost calls by stage.
        total: number of calls kept.
        gradient_leaves: identities of the parameters that the losses of training steps depend on.
    """

    def __init__(self, modules: dict[str, nn.Module], wanted: list[str] | None) -> None:
        self._modules = modules
        self._wanted = wanted
        self._depth = 0
        self.stage = ""
        self.decides = True
        self.calls: dict[str, list[Call]] = {}
        self.outermost: dict[str, list[str]] = {}
        self._called: dict[str, set[str]] = {}
        self._models: set[str] = set()
        self._with_gradients: set[str] = set()
        self.gradient_leaves: set[int] = set()
        self.total = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in self._modules.items():
                if not isinstance(module, (Metric, torch.jit.ScriptModule)):
                    recorded = self._recording_forward(path, module)
                    stack.enter_context(replaced_attribute(module, "forward", recorded))
            stack.callback(setattr, self, "_depth", 0)
            yield

    def _recording_forward(self, path: str, module: nn.Module) -> Any:
        forward = module.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            outermost = self._depth == 0
            kept = outermost if self._wanted is None else path in self._wanted
            modes = {name: m.training for name, m in self._modules[path].named_modules()} if kept else None
            self._depth += 1
            try:
                result = forward(*args, **kwargs)
            finally:
                self._depth -= 1
            self._note(path, Call(args, kwargs, modes), outermost, result)
            return result

        return recorded

    def _note(self, path: str, call: Call, outermost: bool, result: Any) -> None:
        takes_part = path == "" or (
            any(True for _ in self._modules[path].parameters()) and bool(leaves((call.args, call.kwargs)))
        )
        if (outermost and takes_part) if self._wanted is None else path in self._wanted:
            self.calls.setdefault(path, []).append(call)
            self.total += 1
        if not self.decides:
            return
        self._called.setdefault(self.stage, set()).add(path)
        if self.stage == "train" and torch.is_grad_enabled():
            self._with_gradients.add(path)
        if outermost and takes_part and path not in self.outermost.setdefault(self.stage, []):
            self.outermost[self.stage].append(path)
        if not (isinstance(result, Tensor) and result.dim() == 0):
            self._models.add(path)

    def common_targets(self) -> list[str]:
        """The module itself if every step calls it, else the outermost submodules with parameters that take tensors.

        If one step calls ``self(x)`` and another calls ``self.net(x)``, the target is ``net``, as both run it. With the
        module as target, the second step would stay float. Modules that only training calls (they are not deployed)
        and modules that only return single numbers (losses) are no targets.
        """
        stages = {
            stage: [path for path in paths if path in self._models] or paths for stage, paths in self.outermost.items()
        }
        if any("" in paths for paths in stages.values()) and all("" in paths for paths in stages.values()):
            return [""]
        found = list(dict.fromkeys(path for paths in stages.values() for path in paths if path))
        evaluated = [self._called[stage] for stage in stages if stage != "train"]
        found = [path for path in found if all(path in called for called in evaluated)]
        return [path for path in found if not any(other.startswith(path + ".") for other in found)]

    def called(self, path: str) -> bool:
        """Whether a step called a module."""
        return any(path in called for called in self._called.values())

    def called_only_in_training(self, path: str) -> bool:
        """Whether other steps were run, and none of them called a module: its ops stay float."""
        others = [called for stage, called in self._called.items() if stage != "train"]
        return bool(others) and not any(path in called for called in others)

    def called_in_training(self, path: str) -> bool:
        """Whether training steps were run, and called a module."""
        return path in self._called.get("train", ())

    def runs_without_gradients(self, path: str) -> bool:
        """Whether training steps call a module, always under ``no_grad``."""
        return self.called_in_training(path) and path not in self._with_gradients

    def warn_about_float_stages(self, pl_module: pl.LightningModule, wanted: list[str]) -> None:
        """Warn about steps that do not call a target: they stay float."""
        for path in wanted:
            for stage in self.outermost:
                if self.outermost[stage] and path not in self._called[stage]:
                    rank_zero_warn(
                        f"target {path or type(pl_module).__name__!r} is not called by the {stage} step, which stays "
                        f"float (it calls {', '.join(repr(p) for p in self.outermost[stage])}). If that is not "
                        "intended, set target: to a submodule that all steps call."
                    )
