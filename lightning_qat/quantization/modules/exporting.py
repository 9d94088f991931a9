"""Whether ``torch.export`` runs, for every version of torch."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Return whether ``torch.export`` runs.

    ``torch.compiler.is_exporting`` reads the same flag, but torch 2.9 takes it for true under ``torch.compile``.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))
