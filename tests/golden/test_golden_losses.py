"""Losses on a stored rollout stay what they are; a change of losses.json needs a reason in the CHANGELOG."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.golden.golden_rollout import FILE, computed, golden_module, stored_rollout
from tests.toy import naive_logprobs

STORED = json.loads(FILE.read_text(encoding="utf-8"))


def leaves(value: Any, path: str = "") -> dict[str, float]:
    """Every number of a nested value by its path."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in leaves(part, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for index, part in enumerate(value) for k, v in leaves(part, f"{path}/{index}").items()}
    return {path: value}


def test_every_number_is_the_stored_one() -> None:
    found, expected = leaves(computed(STORED["inputs"])), leaves(STORED["expected"])
    assert found.keys() == expected.keys() and len(expected) > 100
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


def test_the_stored_log_probabilities_are_those_of_the_plain_model() -> None:
    """So that the file cannot keep a wrong number for ever."""
    rollout, module = stored_rollout(STORED["inputs"]), golden_module()
    for row, values in enumerate(STORED["expected"]["logprobs"]):
        naive = naive_logprobs(module.causal, rollout, row, STORED["inputs"]["temperature"])
        assert values == pytest.approx(naive.tolist(), rel=1e-6)
        assert min(values) < -1.5
