"""Parameters for an optimizer, with learned scales in a group of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize


def parameter_groups(module: nn.Module, lr: float, scale_lr_factor: float = 0.1) -> list[dict[str, Any]]:
    """Return the parameters of a module for an optimizer: learned scales without weight decay and with their own lr.

    Weight decay would pull scales to zero. Their learning rate is lower because Adam and its relatives move every
    parameter by about ``lr`` per step, however small the parameter and its gradient are: ``lr * scale_lr_factor``
    should be far below the smallest scale. With 4 bits or fewer, scales are large, and factors of 1 to 10 train them
    faster. SGD uses the gradient scale of LSQ: write ``scale_lr_factor=1`` there, which is the paper's choice.

    Without learned scales there is one group with all parameters.

    Args:
        module: the module to train, with or without fake-quants.
        lr: the learning rate of the weights.
        scale_lr_factor: the learning rate of the scales, relative to ``lr``.

    Raises:
        ConfigurationError: ``scale_lr_factor`` is negative.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> insert(model, (torch.randn(16, 4),)).learn_scales()
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3), lr=1e-3, weight_decay=0.05)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        [(4, 0.001, 0.05), (4, 0.0001, 0.0)]
    """
    if not scale_lr_factor >= 0.0:
        raise ConfigurationError(f"scale_lr_factor must be 0 or more, such as 0.1, got {scale_lr_factor!r}.")
    learned = {id(m.scale) for m in module.modules() if isinstance(m, FakeQuantize) and m.learned}
    parameters = list(module.parameters())
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in learned]}]
    if learned:
        scales = [p for p in parameters if id(p) in learned]
        groups.append({"params": scales, "lr": lr * scale_lr_factor, "weight_decay": 0.0})
    return groups
