"""The one name that all forms of a torch function share (function, method, operator, in-place).

``x + y``, ``torch.add``, ``Tensor.add_``, ``x += y``, ``1 + x`` and ``torch.ops.aten.add.Tensor`` are all ``add``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def canonical_kind(func: Callable[..., Any]) -> str:
    """Return the name that all forms of a torch function share.

    Example:
        >>> import torch
        >>> [canonical_kind(f) for f in (torch.add, torch.Tensor.add_, torch.Tensor.__radd__, torch.Tensor.__iadd__)]
        ['add', 'add', 'add', 'add']
        >>> canonical_kind(torch.Tensor.mT.__get__), canonical_kind(torch.special.expit)
        ('mT', 'sigmoid')
    """
    name = getattr(func, "__name__", None) or type(func).__name__
    if name == "__get__":  # an attribute such as Tensor.mT: the descriptor knows its name
        attribute = getattr(func, "__self__", None)
        getter = getattr(attribute, "fget", None)
        return str(getattr(attribute, "__name__", None) or getattr(getter, "__name__", "property"))
    if name in ("__set__", "__delete__"):
        return "set_property"
    module = getattr(func, "__module__", None) or ""
    if module.startswith("torch.distributed"):
        return f"distributed_{name}"
    if module.startswith("torch._ops."):  # torch.ops.aten.add, torch.ops.aten.add.Tensor, torch.ops.torchvision.nms
        namespace, name = module.split(".")[2], name.partition(".")[0]
        if namespace != "aten":
            return f"{namespace}_{name}"
    if name.startswith("__") and name.endswith("__"):
        return _of_operator(name)
    if name in _ALIASES:
        return _ALIASES[name]
    bare = name[:-1] if name.endswith("_") else name
    bare = bare.removeprefix("special_")
    return _ALIASES.get(bare, bare)


def _of_operator(name: str) -> str:
    bare = name[2:-2]
    if bare in _CONVERSIONS:
        return name
    if bare in _OPERATORS:
        return _OPERATORS[bare]
    for prefix in ("r", "i"):
        if bare.startswith(prefix) and bare[1:] in _OPERATORS:
            reflected = prefix == "r" and bare[1:] in _NOT_COMMUTATIVE
            return ("r" if reflected else "") + _OPERATORS[bare[1:]]
    return bare


_OPERATORS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
    "truediv": "div",
    "matmul": "matmul",
    "pow": "pow",
    "mod": "remainder",
    "floordiv": "floor_divide",
    "neg": "neg",
    "pos": "positive",
    "abs": "abs",
    "invert": "bitwise_not",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
    "getitem": "getitem",
    "setitem": "setitem",
}
_NOT_COMMUTATIVE = {"sub", "div", "truediv", "matmul", "pow", "mod", "floordiv"}
_CONVERSIONS = {"bool", "int", "long", "float", "complex", "index", "len", "nonzero"}  # Tensor.float() is another thing

# These keep the underscore: torch.normal(mean) reads its operand, x.normal_() does not; requires_grad is an attribute.
_ALIASES = {name: name for name in ("bernoulli_", "normal_", "requires_grad_")} | {
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_threshold": "threshold",
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "clip": "clamp",
    "col2im": "fold",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "expit": "sigmoid",
    "fix": "trunc",
    "frobenius_norm": "norm",
    "gammainc": "igamma",
    "gammaincc": "igammac",
    "gammaln": "lgamma",
    "ger": "outer",
    "greater": "gt",
    "greater_equal": "ge",
    "im2col": "unfold",
    "less": "lt",
    "less_equal": "le",
    "linalg_cross": "cross",
    "linalg_diagonal": "diagonal",
    "linalg_matmul": "matmul",
    "linalg_matrix_norm": "norm",
    "linalg_multi_dot": "chain_matmul",
    "linalg_norm": "norm",
    "linalg_vecdot": "vecdot",
    "linalg_vector_norm": "norm",
    "log_sigmoid": "logsigmoid",
    "mm": "matmul",
    "moveaxis": "movedim",
    "multigammaln": "mvlgamma",
    "multiply": "mul",
    "native_channel_shuffle": "channel_shuffle",
    "native_norm": "norm",
    "negative": "neg",
    "not_equal": "ne",
    "psi": "digamma",
    "row_stack": "vstack",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "trapz": "trapezoid",
    "true_divide": "div",
    "upsample": "interpolate",
    "upsample_bilinear": "interpolate",
    "upsample_nearest": "interpolate",
}
