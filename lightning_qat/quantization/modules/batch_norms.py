"""Tell which modules are batch norms. Torch's class for that is private; only this module uses it."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_batch_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Return whether a module is ``nn.BatchNorm1d`` ... ``3d``, ``nn.SyncBatchNorm``, a lazy one or a subclass.

    Example:
        >>> is_batch_norm(nn.BatchNorm2d(3)), is_batch_norm(nn.GroupNorm(1, 3))
        (True, False)
    """
    return isinstance(module, _BatchNorm)
