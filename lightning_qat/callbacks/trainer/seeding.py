"""Random numbers that are the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_qat.analysis.captured_calls import seed_generators
from lightning_qat.quantization.modules.preservation import preserved_random_state


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random states in a block, so that it draws the same batches every time. Put them back on exit."""
    with preserved_random_state():
        seed_generators(seed)
        yield
