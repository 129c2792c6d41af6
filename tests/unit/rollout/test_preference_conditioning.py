"""Weights drawn for prompts, the message that names them, and advantages by each prompt's own weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conditioned_toys import reading_tokenizer

from equipoise.config.objectives import TEMPLATE, check_template
from equipoise.data import TruncationCounter, encode_prompt
from equipoise.data.chat import with_preamble
from equipoise.errors import ConfigError, DataError
from equipoise.functional.objectives import combine_objectives
from equipoise.models.preference import Preference, read_preference, rounded
from equipoise.rollout.preference_conditioning import WITHIN_GROUPS, combine_conditioned, sample_weights

MANY = range(4000)


def test_weights_depend_on_seed_step_and_prompt_alone() -> None:
    whole = sample_weights(3, range(8), seed=5, step=2)
    parts = [sample_weights(3, [prompt], seed=5, step=2) for prompt in reversed(range(8))]
    assert torch.equal(whole, torch.cat(parts[::-1])), "whatever rank and order the prompts come in"
    assert not torch.equal(whole, sample_weights(3, range(8), seed=6, step=2))
    assert not torch.equal(whole, sample_weights(3, range(8), seed=5, step=3))
    assert sample_weights(3, [], seed=0, step=0).shape == (0, 3)


def test_weights_are_what_two_decimals_say() -> None:
    weights = sample_weights(4, MANY, seed=0, step=0, concentration=0.7)
    assert (weights >= 0).all()
    assert torch.equal((weights * 100).round(), (weights * 100).round(decimals=9)), "multiples of 1/100"
    assert ((weights * 100).round().sum(1) == 100).all()


def corners(weights: torch.Tensor) -> torch.Tensor:
    return (weights == 1).any(1)


def test_a_share_of_corners_each_as_likely() -> None:
    weights = sample_weights(3, MANY, seed=1, step=0, corner_share=0.25, concentration=5.0)
    at_corner = corners(weights)
    assert at_corner.double().mean() == pytest.approx(0.25, abs=0.03)
    assert weights[at_corner].mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
    assert corners(sample_weights(3, MANY, seed=1, step=0, corner_share=1.0)).all()
    assert not corners(sample_weights(3, MANY, seed=1, step=0, corner_share=0.0, concentration=50.0)).any()


@pytest.mark.parametrize("concentration", [0.5, 1.0, 4.0])
def test_the_rest_is_dirichlet(concentration: float) -> None:
    """Mean 1/K and variance (K - 1) / (K^2 (K c + 1)) of every weight."""
    weights = sample_weights(3, MANY, seed=2, step=0, corner_share=0.0, concentration=concentration)
    assert weights.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    assert weights.var(0).tolist() == pytest.approx([2 / (9 * (3 * concentration + 1))] * 3, rel=0.12)


def test_sampling_refuses() -> None:
    for changes, message in (
        ({"num_objectives": 1}, "at least 2 objectives"),
        ({"corner_share": 1.5}, "corner_share must be between 0 and 1"),
        ({"concentration": 0.0}, "concentration must be above 0"),
    ):
        values = {"num_objectives": 2, "prompts_P": [0], "seed": 0, "step": 0} | changes
        with pytest.raises(ValueError, match=message):
            sample_weights(**values)  # type: ignore[arg-type]


def test_the_message() -> None:
    weights = {"safety": 0.3, "politeness": 0.7}
    preference = Preference(("politeness", "safety"), TEMPLATE)
    assert preference.text(weights) == "Weigh your objectives in this way: politeness 0.70, safety 0.30."
    assert Preference(("safety", "politeness"), "[{weights}]").text(weights) == "[safety 0.30, politeness 0.70]"
    for template in ("no place", "{weights} {weights}"):
        with pytest.raises(ValueError, match=r"needs \{weights\} once"):
            check_template(template)


def test_only_ratios_of_weights_count() -> None:
    preference = Preference(("a", "b", "c"), TEMPLATE)
    assert preference.shares({"c": 1, "a": 1, "b": 1}) == {"a": 0.34, "b": 0.33, "c": 0.33}
    assert preference.shares({"a": 0, "b": 2, "c": 6}) == {"a": 0.0, "b": 0.25, "c": 0.75}
    assert rounded([0.29, 0.57, 0.14]) == [0.29, 0.57, 0.14], "0.29 * 100 is 28.999... in floating point"
    assert rounded([0.126, 0.126, 0.748]) == [0.13, 0.12, 0.75]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"polite": 1, "safety": 1}, "unknown aspect 'polite'.*did you mean 'politeness'.*politeness, safety"),
        ({"safety": 1}, "no weight for 'politeness'; add politeness=0"),
        ({"safety": 1, "politeness": -1}, "politeness=-1; use a finite number"),
        ({"safety": 1, "politeness": math.inf}, "politeness=inf"),
        ({"safety": 0, "politeness": 0}, "all weights are 0"),
    ],
)
def test_weights_that_cannot_be_asked(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preference(("politeness", "safety"), TEMPLATE).shares(weights)


def test_what_a_model_says_of_itself(tmp_path: Path) -> None:
    file = tmp_path / "equipoise.json"
    assert read_preference(file) is None
    preference = Preference(("a", "b"), "x {weights}")
    for values, expected in (({"prompt_format": "text"}, None), ({"conditioned": preference.to_json()}, preference)):
        file.write_text(json.dumps(values))
        assert read_preference(file) == expected
    for broken in ("{", '{"conditioned": {}}', '{"conditioned": {"aspects": ["a"], "template": "{weights}"}}',
                   '{"conditioned": {"aspects": ["a", "b"], "template": "x"}}', '{"conditioned": 3}'):  # fmt: skip
        file.write_text(broken)
        with pytest.raises(ConfigError, match=r"equipoise\.json: does not say how the policy is asked"):
            read_preference(file)


def test_where_the_message_stands() -> None:
    assert with_preamble("hello", "W", chat=False) == "W\n\nhello"
    user = {"role": "user", "content": "hello"}
    assert with_preamble("hello", "W", chat=True) == [{"role": "system", "content": "W"}, user]
    assert with_preamble([user], "W", chat=True) == [{"role": "system", "content": "W"}, user]
    own = [{"role": "system", "content": "Be brief."}, user]
    assert with_preamble(own, "W", chat=True) == [{"role": "system", "content": "Be brief.\nW"}, user]
    assert own[0]["content"] == "Be brief.", "the prompt given is left as it is"


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_cut_keeps_the_message(chat: bool) -> None:
    tokenizer = reading_tokenizer(chat=chat)
    text = "a 0.50, b 0.50."
    whole = encode_prompt(tokenizer, "how do i make the cake", preamble=text)
    assert text.replace(" ", "") in str(tokenizer.decode(whole)).replace(" ", "")
    counter = TruncationCounter()
    cut = encode_prompt(tokenizer, "how do i make the cake", preamble=text, max_length=len(whole) - 3, counter=counter)
    assert counter.truncated == 1 and len(cut) == len(whole) - 3
    shown = str(tokenizer.decode(cut)).replace(" ", "")
    assert text.replace(" ", "") in shown and "how" not in shown and shown.count("cake") == 1
    with pytest.raises(DataError, match=r"nothing of the prompt fits: 5 tokens allowed.*of them what stands above it"):
        encode_prompt(tokenizer, "how do i make the cake", preamble=text, max_length=5)


def test_advantages_example() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    found = combine_conditioned(rewards, torch.tensor([4, 4, 9, 9]), weights, delta=0.0)
    assert found.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), -(0.5**0.5), 0.5**0.5])


@pytest.mark.parametrize("method", WITHIN_GROUPS)
def test_one_preference_for_all_is_the_plain_combination(method: str) -> None:
    """Which is also what makes a method one that looks at a group at a time."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, 3, generator=generator, dtype=torch.float64)
    rewards[5, 1] = float("nan")
    ids = torch.arange(24) % 4
    weights_K = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    special: dict[str, dict[str, Any]] = {
        "conditioned": {"gate": 0, "threshold": 0.4},
        "mo_grpo": {"weighted": True},
        "chebyshev": {"ideal": 1.0},
    }
    options = special.get(method, {})
    expected = combine_objectives(rewards, ids, weights_K, method=method, **options)
    found = combine_conditioned(rewards, ids, weights_K.expand(24, -1), method=method, **options)
    torch.testing.assert_close(found, expected)


def test_a_gate_that_one_group_lacks_is_no_fault() -> None:
    rewards = torch.tensor([[math.nan, 1.0], [math.nan, 0.0], [1.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    ids, weights = torch.tensor([0, 0, 1, 1]), torch.full((4, 2), 0.5, dtype=torch.float64)
    found = combine_conditioned(rewards, ids, weights, method="conditioned", gate=0, delta=0.0)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.5**0.5, -(0.5**0.5)])
    with pytest.raises(ValueError, match="is not scored for any completion"):
        combine_conditioned(rewards[:2], ids[:2], weights[:2], method="conditioned", gate=0)


def test_advantages_refuse() -> None:
    rewards, ids = torch.rand(4, 2, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="group 0 has two preferences"):
        combine_conditioned(rewards, ids, mixed)
    across: list[tuple[str, dict[str, Any]]] = [
        ("gdpo", {}),
        ("whitened", {}),
        ("chebyshev", {}),
        ("weighted_sum", {"scale": "batch"}),
        ("conditioned", {"gate": 0, "base": "gdpo"}),
    ]
    for method, options in across:
        with pytest.raises(ValueError, match="looks across groups"):
            combine_conditioned(rewards, ids, mixed, method=method, **options)
