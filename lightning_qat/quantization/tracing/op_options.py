"""The few arguments of a call besides tensors that the graph keeps, because a check needs them."""

from __future__ import annotations

from typing import Any

_TRAINING_ARGUMENT = {
    **dict.fromkeys(["dropout", "dropout1d", "dropout2d", "dropout3d"], (2, True)),
    **dict.fromkeys(["alpha_dropout", "feature_alpha_dropout"], (2, False)),
    "feature_dropout": (2, True),
    "rrelu": (3, False),
}
"""By kind: position and default of the argument that switches the noise on."""


def call_options(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> dict[str, Any]:
    """Return the arguments of a call that the graph keeps, as primitives.

    Args:
        kind: canonical torch function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        training: whether the target was in train mode.

    Returns:
        ``equation`` of an einsum; ``rounding_mode`` of a division that has one; ``random_in_eval`` for dropout that is
        active in eval mode.

    Example:
        >>> import torch
        >>> call_options("einsum", ("ij,jk", torch.ones(2, 2), torch.ones(2, 2)), {}, training=False)
        {'equation': 'ij,jk'}
        >>> call_options("dropout", (torch.ones(2), 0.1), {"training": True}, training=False)
        {'random_in_eval': True}
    """
    if kind == "einsum" and args and isinstance(args[0], str):
        return {"equation": args[0]}
    if kind == "div" and kwargs.get("rounding_mode") is not None:
        return {"rounding_mode": kwargs["rounding_mode"]}
    if training:
        return {}
    if kind in _TRAINING_ARGUMENT:
        position, default = _TRAINING_ARGUMENT[kind]
        active = kwargs.get("training", kwargs.get("train", args[position] if len(args) > position else default))
        share = 1.0 if kind == "rrelu" else kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        return {"random_in_eval": True} if active and share else {}
    if kind == "scaled_dot_product_attention":
        return {"random_in_eval": True} if kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) else {}
    return {}
