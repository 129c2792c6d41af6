"""What every test of an algorithm starts with."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def norms_of_models_in_float64(exact_norms: None) -> None:
    """The slow twins run a model's own layers, the algorithms its blocks by hand: both exact."""
