"""Models of the sandbox: sizes, a tokenizer that reloads, names that resolve."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from equipoise.config import LoraConfig, ModelConfig
from equipoise.errors import ConfigError
from equipoise.models.loading import load_config
from equipoise.models.policy import load_policy
from equipoise.sandbox.models import SIZES, model_config, tokenizer, write_model


def test_a_name_gives_a_policy_with_seeded_random_weights():
    first, second, other = (load_policy("sandbox/1m", seed=seed) for seed in (0, 0, 1))
    weights = [next(policy.module.parameters()) for policy in (first, second, other)]
    assert first.name == "sandbox/1m"
    assert (weights[0] == weights[1]).all()
    assert not (weights[0] == weights[2]).all()


@pytest.mark.parametrize(("size", "millions"), [("1m", 1), ("4m", 4), ("16m", 16)])
def test_sizes_are_what_they_are_called(size, millions):
    from transformers import AutoModelForCausalLM

    from equipoise.models.loading import count_parameters

    assert abs(count_parameters(AutoModelForCausalLM, model_config(size)) / 1e6 - millions) < 0.25 * millions


def test_the_tokenizer_reloads_with_the_same_ids(tmp_path):
    """Pitfall 18."""
    write_model("1m", tmp_path)
    text = "Which steps does attacking a weak pawn take? Grüße, 東京!"
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded(text)["input_ids"] == tokenizer()(text)["input_ids"]
    assert reloaded.decode(reloaded(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "Hello"}]
    assert reloaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|user|>Hello<|assistant|>"
    )


def test_an_unknown_size_and_an_adapter_on_random_weights_are_refused():
    with pytest.raises(ConfigError, match=r"sandbox/2m.*sandbox/1m"):
        load_config("sandbox/2m")
    with pytest.raises(ConfigError, match="random weights"):
        load_policy(ModelConfig(model="sandbox/1m", lora=LoraConfig(r=2)))
    assert list(SIZES) == ["1m", "4m", "16m"]
