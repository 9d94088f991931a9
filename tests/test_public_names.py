"""What the documents name is public at the top of the package: users import from nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_qat

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_that_a_document_uses_is_public(path: Path) -> None:
    text = path.read_text()
    names = set(re.findall(r"\blightning_qat\.([a-zA-Z_]\w*)(?![\w/])", text))
    for imported in re.findall(r"^from lightning_qat import ([^\n(]+|\([^)]*\))", text, flags=re.M):
        names |= set(re.findall(r"\w+", imported))
    assert names <= {*lightning_qat.__all__}, names - {*lightning_qat.__all__}
    assert not re.search(r"^\s*from lightning_qat\.\w+", text, flags=re.M)


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    assert lightning_qat.__all__ == sorted(lightning_qat.__all__, key=lambda name: (not name[0].isupper(), name))
    for name in lightning_qat.__all__:
        assert getattr(lightning_qat, name).__doc__ or name == "__version__"
