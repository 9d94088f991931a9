"""How far a quantized tensor is from the float one: L1, MSE, Cosine, SQNR, KL, Atol, Rtol.

All are computed in float64. L1, MSE, Cosine, SQNR and KL follow from a few sums over the elements, so several batches,
outputs and ranks are combined exactly, by adding the sums: :func:`error_sums`, then :func:`metric_of_sums`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat.quantization.errors import ConfigurationError, unknown_choice

MetricName = Literal["L1", "MSE", "Cosine", "SQNR", "KL"]

_FIELDS = ("count", "absolute", "squared", "base_squared", "analy_squared", "product", "kl")


def l1(base: Tensor, analy: Tensor) -> Tensor:
    """Mean absolute difference.

    Args:
        base: values of the float model, any shape.
        analy: values of the quantized model, same shape.

    Example:
        >>> l1(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(1., dtype=torch.float64)
    """
    return metric_of_sums("L1", error_sums(base, analy))


def mse(base: Tensor, analy: Tensor) -> Tensor:
    """Mean squared difference; arguments as in :func:`l1`.

    Example:
        >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2., dtype=torch.float64)
    """
    return metric_of_sums("MSE", error_sums(base, analy))


def cosine(base: Tensor, analy: Tensor) -> Tensor:
    """Cosine of the angle between the flattened tensors: 1 if both are zero, 0 if one of them is.

    Example:
        >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
        tensor(0.6000, dtype=torch.float64)
    """
    return metric_of_sums("Cosine", error_sums(base, analy))


def sqnr(base: Tensor, analy: Tensor) -> Tensor:
    """Signal to quantization noise ratio in dB, ``20 * log10(|base| / |base - analy|)``; inf if nothing differs.

    Example:
        >>> sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        tensor(20., dtype=torch.float64)
    """
    return metric_of_sums("SQNR", error_sums(base, analy))


def kl(base: Tensor, analy: Tensor) -> Tensor:
    """Mean over all elements of ``softmax(base) * (log_softmax(base) - log_softmax(analy))``.

    The softmax runs along dimension 1 if there are more than two, else along the last.

    Example:
        >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0]]))
        tensor(0., dtype=torch.float64)
    """
    return metric_of_sums("KL", error_sums(base, analy, with_kl=True))


def atol(base: Tensor, analy: Tensor) -> Tensor:
    """Largest absolute difference.

    Example:
        >>> atol(torch.tensor([1.0, -2.0]), torch.tensor([1.5, -4.0]))
        tensor(2., dtype=torch.float64)
    """
    return (_double(base) - _double(analy)).abs().max()


def rtol(base: Tensor, analy: Tensor) -> Tensor:
    """Largest difference relative to ``base``; inf where a zero of ``base`` is not zero any more.

    Example:
        >>> rtol(torch.tensor([0.0, -2.0]), torch.tensor([0.0, -3.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    base, analy = _double(base), _double(analy)
    difference = (base - analy).abs()
    return torch.where(difference == 0, 0.0, difference / base.abs()).max()


def check_metric(metric: str) -> None:
    """Raise a ConfigurationError for a metric that does not exist."""
    if metric not in get_args(MetricName):
        raise unknown_choice("metric", metric, get_args(MetricName))


def error_sums(base: Tensor, analy: Tensor, with_kl: bool = False) -> Tensor:
    """The sums from which the metrics follow; add those of several tensors to get the metric over all of them.

    Args:
        base: values of the float model, any shape.
        analy: values of the quantized model, same shape.
        with_kl: also the sum of KL, which costs two softmaxes (0 otherwise).

    Returns:
        float64 ``(7,)``: number of elements, sums of ``|b - a|``, ``(b - a)**2``, ``b**2``, ``a**2``, ``a * b`` and of
        the terms of KL.

    Raises:
        ConfigurationError: the shapes differ.
    """
    if base.shape != analy.shape:
        raise ConfigurationError(f"cannot compare tensors of shapes {tuple(base.shape)} and {tuple(analy.shape)}.")
    base, analy = _double(base), _double(analy)
    difference = base - analy
    sums = [
        base.new_tensor(float(base.numel())),
        difference.abs().sum(),
        difference.square().sum(),
        base.square().sum(),
        analy.square().sum(),
        (base * analy).sum(),
        _kl_terms(base, analy).sum() if with_kl else base.new_zeros(()),
    ]
    return torch.stack(sums)


def metric_of_sums(metric: MetricName, sums: Tensor) -> Tensor:
    """Return a metric from the sums of :func:`error_sums`; nan if there were no elements.

    Example:
        >>> b, a = torch.randn(2, 100)
        >>> parts = error_sums(b[:30], a[:30]) + error_sums(b[30:], a[30:])
        >>> torch.allclose(metric_of_sums("SQNR", parts), sqnr(b, a))
        True
    """
    check_metric(metric)
    count, absolute, squared, base_squared, analy_squared, product, kl_terms = sums.unbind()
    if metric == "L1":
        return absolute / count
    if metric == "MSE":
        return squared / count
    if metric == "KL":
        return kl_terms / count
    if metric == "SQNR":
        return torch.where((squared == 0) & (count > 0), torch.inf, 10 * torch.log10(base_squared / squared))
    both_zero = (base_squared == 0) & (analy_squared == 0) & (count > 0)
    one_zero = (base_squared == 0) ^ (analy_squared == 0)
    value = (product / (base_squared.sqrt() * analy_squared.sqrt())).clamp(-1.0, 1.0)
    return torch.where(both_zero, 1.0, torch.where(one_zero, 0.0, value))


class QuantizationError(Metric):
    """One of the metrics above over several batches and ranks.

    Args:
        metric: ``L1``, ``MSE``, ``Cosine``, ``SQNR`` or ``KL``.
        kwargs: see ``torchmetrics.Metric``.

    Example:
        >>> error = QuantizationError("MSE")
        >>> error.update(torch.zeros(2), torch.ones(2))
        >>> error.update(torch.zeros(2), torch.zeros(2))
        >>> error.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor

    def __init__(self, metric: MetricName = "MSE", **kwargs: Any) -> None:
        check_metric(metric)
        super().__init__(**kwargs)
        self.metric = metric
        self.add_state("sums", torch.zeros(len(_FIELDS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, base: Tensor, analy: Tensor) -> None:
        """Add a batch of values of the float and of the quantized model."""
        self.sums += error_sums(base, analy, with_kl=self.metric == "KL").to(self.sums.device)

    def compute(self) -> Tensor:
        """Return the metric over everything seen."""
        return metric_of_sums(self.metric, self.sums)


def _kl_terms(base: Tensor, analy: Tensor) -> Tensor:
    dim = 1 if base.ndim > 2 else -1
    log_base = base.log_softmax(dim)
    return log_base.exp() * (log_base - analy.log_softmax(dim))


def _double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # Apple's GPUs have no float64
