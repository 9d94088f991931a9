"""How the values of a point are spread over the codes of its type."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qat.analysis.statistics.point_statistics import PointStatistics
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class CodeHistogram:
    """How the values of one point are spread over the codes of its type; those of all channels together.

    Args:
        point: name of the point.
        first_code: the smallest code of the type.
        codes_per_bin: how many codes share a bin.
        counts: number of values in each bin, the smallest codes first; without the clipped ones.
        below: values clipped because they are below the range.
        above: values clipped because they are above it.
        region: path of the target in the model, ``""`` for the model itself.
    """

    point: str
    first_code: int
    codes_per_bin: int
    counts: tuple[int, ...]
    below: int
    above: int
    region: str = ""

    @classmethod
    def of(cls, name: str, fake_quant: FakeQuantize, found: PointStatistics) -> CodeHistogram:
        """Return the histogram of what a point has seen.

        Args:
            name: of the point.
            fake_quant: the point.
            found: its statistics.
        """
        counts = tuple(map(int, found.bins.tolist()))
        below = int(found.clipped - found.above)
        return cls(name, fake_quant.quant_min, found.bin_width, counts, below, int(found.above))
