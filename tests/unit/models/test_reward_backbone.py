"""Which models can be a reward model, and what is said of those that cannot."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.reward_toys import byte_tokenizer, config_of, save_backbone, word_tokenizer

from equipoise.config import BackboneConfig
from equipoise.errors import ConfigError
from equipoise.models.aspects import Aspect
from equipoise.models.reward_backbone import set_dropout
from equipoise.models.reward_model import RewardModel


def load(directory, **options) -> RewardModel:
    return RewardModel.from_backbone(BackboneConfig(model=str(directory), **options), [Aspect("a", True)])


def seq2seq_config(kind: str):
    size = {"vocab_size": 21, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 3}
    if kind == "t5":
        return transformers.T5Config(**size, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.BartConfig(
        **size, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused(kind: str, tmp_path):
    seq2seq_config(kind).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"unsupported backbone for a reward model: {kind} is an encoder-decoder"):
        load(tmp_path, initialise="random")


def test_model_without_a_classification_class_is_refused(tmp_path):
    transformers.VitsConfig(vocab_size=300).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no sequence-classification class for 'vits'"):
        load(tmp_path, initialise="random")


def test_model_whose_outputs_change_with_padding_is_refused(tmp_path):
    """FNet mixes every column into every other and takes no mask."""
    config = transformers.FNetConfig(
        vocab_size=21, hidden_size=16, num_hidden_layers=1, intermediate_size=32, max_position_embeddings=64
    )
    save_backbone(tmp_path, config=config)
    with pytest.raises(ConfigError, match=r"FNetForSequenceClassification change with right padding"):
        load(tmp_path)


def test_model_that_pools_at_the_last_column_is_refused(tmp_path):
    """XLNet expects padding on the left."""
    config = transformers.XLNetConfig(vocab_size=21, d_model=16, n_layer=1, n_head=2, d_inner=32, pad_token_id=0)
    save_backbone(tmp_path, config=config)
    with pytest.raises(ConfigError, match=r"XLNetForSequenceClassification change with right padding"):
        load(tmp_path)


def test_missing_directory_and_directory_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="no such model directory"):
        load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="not a model directory"):
        load(tmp_path)


def test_directory_without_a_tokenizer(tmp_path):
    config_of("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        load(tmp_path, initialise="random")


def test_pickled_weights_are_not_read(tmp_path):
    save_backbone(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load the model"):
        load(tmp_path)


def test_checkpoint_that_lacks_weights_of_the_network_is_refused(tmp_path):
    save_backbone(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are not in the checkpoint \(bert\.encoder\.layer\.0"):
        load(tmp_path)


def test_tokenizer_with_more_tokens_than_embeddings(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["another"])
    save_backbone(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="22 tokens and the model 21 embeddings"):
        load(tmp_path)


def test_tokenizer_without_a_pad_token_gets_one_that_is_not_eos(tmp_path):
    save_backbone(tmp_path / "gpt2", "gpt2")
    model = load(tmp_path / "gpt2")
    assert model.tokenizer.pad_token == "<|pad|>"
    assert model.module.model.get_input_embeddings().weight.shape[0] == len(model.tokenizer) == 260
    assert model.module.model.config.pad_token_id == 259
    tokenizer = byte_tokenizer(pad="<|eos|>")
    save_backbone(tmp_path / "eos", "gpt2", tokenizer=tokenizer)
    assert load(tmp_path / "eos").tokenizer.pad_token_id == 259


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_added_pad_token_gives_the_same_scores_after_loading(architecture: str, tmp_path):
    config = config_of(architecture)
    config.vocab_size, config.pad_token_id = 259, 0
    config.eos_token_id = 0
    save_backbone(tmp_path / "backbone", config=config, tokenizer=byte_tokenizer())
    model = load(tmp_path / "backbone")
    texts = (["cat", ""], ["dog", "a rather long one"])
    again = RewardModel.load(model.save(tmp_path / "model"))
    assert again.module.model.config.pad_token_id == 259
    torch.testing.assert_close(again.score(*texts), model.score(*texts))
    assert again.encode(*texts)["input_ids"].tolist() == model.encode(*texts)["input_ids"].tolist()


def test_network_that_cannot_take_a_pad_token_is_refused(tmp_path):
    """RoBERTa counts positions from the pad id: an id beyond its 64 positions leaves none."""
    config = config_of("roberta")
    config.vocab_size = 259
    save_backbone(tmp_path, config=config, tokenizer=byte_tokenizer())
    with pytest.raises(ConfigError, match=r"no pad token, and RobertaForSequenceClassification cannot take"):
        load(tmp_path)


def test_spare_embedding_rows_are_used_before_more_are_made(tmp_path):
    config = config_of("gpt2")
    config.vocab_size = 300
    save_backbone(tmp_path, "gpt2", config=config)
    assert load(tmp_path).module.model.get_input_embeddings().weight.shape[0] == 300


def test_head_of_another_task_is_not_kept(tmp_path):
    """A two-class classifier gives its network, and not its two rows, to a model with one output or with two."""
    config = config_of("bert")
    torch.manual_seed(0)
    other = transformers.BertForSequenceClassification(config)
    other.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path).module.model.config.num_labels == 1
    two = RewardModel.from_backbone(BackboneConfig(model=str(tmp_path)), [Aspect("a", True), Aspect("b", True)])
    assert not torch.equal(two.module.model.classifier.weight, other.classifier.weight)
    assert torch.equal(two.module.model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


def test_labels_are_named(tmp_path):
    config = config_of("bert")
    config.id2label = {0: "spam", 1: "ham"}
    save_backbone(tmp_path, config=config)
    assert load(tmp_path).module.model.config.id2label == {0: "a"}


def test_broken_config(tmp_path):
    save_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ConfigError, match="cannot read the model's configuration"):
        load(tmp_path)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2", "llama"])
def test_dropout_is_set_everywhere_and_null_rates_stay(architecture: str):
    config = config_of(architecture)
    names = set_dropout(config, 0.25)
    assert names
    assert all(getattr(config, name) == 0.25 for name in names)
    if architecture == "bert":
        assert config.classifier_dropout is None  # follows hidden_dropout_prob
        assert names == ["hidden_dropout_prob", "attention_probs_dropout_prob"]
