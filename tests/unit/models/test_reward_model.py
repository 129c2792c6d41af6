"""The contract of a reward model on disk, for heads with and without bias, and scoring in native units."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.reward_toys import ASPECTS, DECODERS, ENCODERS, save_backbone
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from equipoise.config import BackboneConfig, InputFormatConfig
from equipoise.errors import CheckpointError, ConfigError, DataError, RewardError
from equipoise.models.aspects import Aspect
from equipoise.models.reward_model import RewardModel

PROMPTS = ["cat dog", "", [{"role": "user", "content": "fox jam"}], "hat " * 100, "mean"]
RESPONSES = ["good kind", "no", "low " * 70, "oak", ""]
STDS = torch.tensor([aspect.std for aspect in ASPECTS])


def new_model(directory: Path, **options) -> RewardModel:
    """A model with a bias other than 0, as training leaves it."""
    model = RewardModel.from_backbone(BackboneConfig(model=str(directory), **options), ASPECTS, None, seed=1)
    if model._backbone.head.bias is not None:
        torch.nn.init.uniform_(model._backbone.head.bias, -1, 1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {name: save_backbone(root / name, name) for name in ENCODERS + DECODERS}


@pytest.fixture(scope="module")
def saved_bert(backbones, tmp_path_factory):
    return new_model(backbones["bert"]).save(tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize("architecture", ENCODERS + DECODERS)
def test_plain_transformers_gives_the_same_scores(architecture: str, backbones, tmp_path):
    """logits of AutoModelForSequenceClassification on encode(...), plus offset, equal score() to 1e-5 std."""
    model = new_model(backbones[architecture])
    before = model.score(PROMPTS, RESPONSES)
    assert (before.std(dim=0) / STDS > 0.05).all()
    path = model.save(tmp_path / "model")
    loaded = RewardModel.load(path)
    stored = json.loads((path / "equipoise.json").read_text())
    plain = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True).eval()
    with torch.no_grad():
        logits = plain(**loaded.encode(PROMPTS, RESPONSES)).logits
    scores = loaded.score(PROMPTS, RESPONSES)
    assert scores.dtype == torch.float32 and scores.shape == (5, 3)
    assert ((logits + torch.tensor(stored["offset"]) - scores) / STDS).abs().max() < 1e-5
    assert ((before - scores) / STDS).abs().max() < 1e-5
    # Some encoders project without a bias (ModernBERT's classifier has one): the offset is 0 exactly where there is.
    has_bias = architecture in ENCODERS
    assert (stored["offset"] == [0.0] * 3) == has_bias
    if not has_bias:
        assert stored["offset"] == [aspect.mean for aspect in ASPECTS]


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_what_is_on_disk(architecture: str, backbones, tmp_path):
    model = new_model(backbones[architecture])
    path = model.save(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "toxicity", "1": "set/politeness", "2": "safety"}
    assert config["pad_token_id"] == AutoTokenizer.from_pretrained(path).pad_token_id is not None
    tensors = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    stored = json.loads((path / "equipoise.json").read_text())
    assert stored["aspects"]["toxicity"] == {"range": [1.0, 5.0], "higher_is_better": False, "mean": 3.0, "std": 0.5}
    assert stored["input_format"] == {"format": "pair", "separator": "\n", "max_length": model.inputs.format.max_length}
    texts = ["Good kind cat", "fox\njam"]
    assert AutoTokenizer.from_pretrained(path)(texts)["input_ids"] == model.tokenizer(texts)["input_ids"]


def test_loaded_model_knows_its_aspects(saved_bert):
    model = RewardModel.load(saved_bert)
    assert model.aspects == ["toxicity", "set/politeness", "safety"]
    assert model.aspect_specs == ASPECTS
    assert not model.module.training


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_module_is_standardised_before_saving_and_after(architecture: str, backbones, tmp_path):
    model = new_model(backbones[architecture])
    model.module.eval()
    batch = model.encode(PROMPTS, RESPONSES)
    native = model.score(PROMPTS, RESPONSES)
    means = torch.tensor([aspect.mean for aspect in ASPECTS])
    with torch.no_grad():
        fresh = model.module(**batch)
        assert torch.equal(fresh, model.module.logits(**batch))
        torch.testing.assert_close(fresh, (native - means) / STDS, atol=1e-4, rtol=0)
        loaded = RewardModel.load(model.save(tmp_path / "model"))
        torch.testing.assert_close(loaded.module(**loaded.encode(PROMPTS, RESPONSES)), fresh, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "qwen2", "gpt2"])
def test_batching_by_length_equals_one_by_one(architecture: str, backbones):
    model = new_model(backbones[architecture])
    batched = model.score(PROMPTS, RESPONSES, batch_size=2)
    single = torch.cat([model.score([p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    assert ((batched - single) / STDS).abs().max() < 1e-5


def test_score_of_nothing_is_empty(saved_bert):
    assert RewardModel.load(saved_bert).score([], []).shape == (0, 3)


def test_score_leaves_the_mode_and_draws_no_dropout(backbones):
    model = new_model(backbones["bert"])
    model.module.train()
    assert torch.equal(model.score(PROMPTS, RESPONSES), model.score(PROMPTS, RESPONSES))
    assert model.module.training


def test_decoder_pools_at_the_final_eos_whatever_the_text_holds(backbones):
    """The pad token is not EOS, so the token that is pooled is the EOS after the response, for every response."""
    model = new_model(backbones["gpt2"])
    assert model.tokenizer.pad_token_id != model.tokenizer.eos_token_id
    batch = model.encode(["a", "a"], ["b <|eos|> c", "b"])
    last = batch["attention_mask"].sum(dim=1) - 1
    assert batch["input_ids"][torch.arange(2), last].tolist() == [model.tokenizer.eos_token_id] * 2
    hidden = model.module.model.transformer(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    expected = model._backbone.head(hidden[torch.arange(2), last])
    torch.testing.assert_close(model.module.logits(**batch), expected)


def test_fresh_weights_are_a_function_of_the_seed(backbones):
    def head(seed: int, **options) -> torch.Tensor:
        config = BackboneConfig(model=str(backbones["bert"]), **options)
        torch.manual_seed(torch.seed() % 1000)  # the global generator must not matter
        return RewardModel.from_backbone(config, ASPECTS, None, seed)._backbone.head.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))
    assert torch.equal(head(0, initialise="random"), head(0, initialise="random"))


def test_pretrained_weights_are_taken_and_random_ones_are_not(backbones):
    stored = load_file(backbones["bert"] / "model.safetensors")["embeddings.word_embeddings.weight"]

    def embeddings(initialise: str) -> torch.Tensor:
        config = BackboneConfig(model=str(backbones["bert"]), initialise=initialise)
        return RewardModel.from_backbone(config, ASPECTS, seed=1).module.model.bert.embeddings.word_embeddings.weight

    assert torch.equal(embeddings("pretrained"), stored)
    assert not torch.equal(embeddings("random"), stored)


def test_training_goes_on_from_a_saved_model_with_the_same_aspects(saved_bert):
    saved = RewardModel.load(saved_bert)
    other_moments = [Aspect(a.name, a.higher_is_better, a.range, a.mean + 1, a.std * 2) for a in ASPECTS]
    again = RewardModel.from_backbone(BackboneConfig(model=str(saved_bert)), other_moments, saved.inputs.format, seed=5)
    expected = saved.score(PROMPTS, RESPONSES)
    assert ((again.score(PROMPTS, RESPONSES) - expected) / STDS).abs().max() < 1e-5
    again.module.eval()
    with torch.no_grad():
        standardised = again.module(**again.encode(PROMPTS, RESPONSES))
    means, stds = (torch.tensor([getattr(a, name) for a in other_moments]) for name in ("mean", "std"))
    torch.testing.assert_close(standardised, (expected - means) / stds, atol=1e-4, rtol=0)


def test_other_aspects_get_a_fresh_head(saved_bert):
    model = RewardModel.from_backbone(BackboneConfig(model=str(saved_bert)), [Aspect("new", True)])
    assert model.module.model.config.num_labels == 1
    assert model.score(["a"], ["b"]).shape == (1, 1)


def test_forward_flops_worked(backbones):
    """DistilBERT of width 16: a layer has 4 * 16 * 16 + 2 * 16 * 32 = 2048 weights, two layers 4096; the head
    16 * 16 + 16 * 3 = 304. A row of 5 tokens: 2 * 4400 * 5 + 4 * 16 * 2 * 25 = 44,000 + 3,200 = 47,200.
    """
    model = new_model(backbones["distilbert"])
    rows = model.inputs.rows(["cat", "cat"], ["dog", "dog"])
    assert model.forward_flops(rows[:1]) == 47_200
    assert model.forward_flops(rows) == 94_400


def test_dropout_override(backbones):
    model = new_model(backbones["bert"], dropout=0.0)
    assert {m.p for m in model.module.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in new_model(backbones["bert"]).module.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_bfloat16_is_close_and_keeps_weights_float32(saved_bert):
    exact = RewardModel.load(saved_bert).score(PROMPTS, RESPONSES)
    low = RewardModel.load(saved_bert, precision="bfloat16")
    assert {p.dtype for p in low.module.parameters()} == {torch.float32}
    difference = (low.score(PROMPTS, RESPONSES) - exact).abs().max(dim=0).values
    # The folded logits are near the mean, -40 for one aspect, and bfloat16 has 8 bits: half a unit in the last place.
    assert (difference / torch.tensor([4.0, 64.0, 1.0]) < 2**-6).all()


def test_gradient_checkpointing_changes_no_gradient(backbones):
    gradients = []
    for checkpointing in (False, True):
        model = new_model(backbones["llama"], gradient_checkpointing=checkpointing, dropout=0.0)
        model.module.train()
        model.module(**model.encode(PROMPTS, RESPONSES)).square().sum().backward()
        gradients.append(model.module.model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_max_length_is_capped_by_the_positions(backbones):
    limits = {name: new_model(backbones[name]).inputs.format.max_length for name in ("bert", "roberta", "gpt2")}
    assert limits == {"bert": 64, "roberta": 63, "gpt2": 256}  # RoBERTa: position 0 belongs to padding


def test_truncation_is_counted(backbones):
    model = new_model(backbones["bert"])
    model.score(PROMPTS, RESPONSES)
    assert model.truncation.to_json() == {"rows": 5, "prompts_truncated": 2, "responses_truncated": 1}


def test_non_finite_score_names_aspect_and_row(backbones):
    model = new_model(backbones["bert"])
    with torch.no_grad():
        model._backbone.head.weight[1] = float("nan")
    with pytest.raises(RewardError, match=r"'set/politeness' in row 0 is nan"):
        model.score(PROMPTS, RESPONSES)


def test_lists_of_different_length(saved_bert):
    with pytest.raises(DataError, match="1 prompts and 2 responses"):
        RewardModel.load(saved_bert).score(["a"], ["b", "c"])


def test_saving_twice_replaces_and_leaves_nothing_else(backbones, tmp_path):
    model = new_model(backbones["bert"])
    model.save(tmp_path / "model")
    with torch.no_grad():
        model._backbone.head.weight.zero_()
    model.save(tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert RewardModel.load(tmp_path / "model").score(["a"], ["b"]).isfinite().all()


def test_full_disk_keeps_the_earlier_model(backbones, tmp_path, monkeypatch):
    model = new_model(backbones["bert"])
    model.save(tmp_path / "model")
    before = RewardModel.load(tmp_path / "model").score(PROMPTS, RESPONSES)

    def no_space(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.module.model), "save_pretrained", no_space)
    with pytest.raises(CheckpointError, match=r"No space left.*untouched"):
        model.save(tmp_path / "model")
    assert torch.equal(RewardModel.load(tmp_path / "model").score(PROMPTS, RESPONSES), before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_duplicate_aspects_are_refused(backbones):
    with pytest.raises(ConfigError, match="named twice: a"):
        RewardModel.from_backbone(BackboneConfig(model=str(backbones["bert"])), [Aspect("a", True), Aspect("a", True)])


def broken_copy(source: Path, target: Path, **changes) -> Path:
    shutil.copytree(source, target)
    values = json.loads((target / "equipoise.json").read_text())
    (target / "equipoise.json").write_text(json.dumps({**values, **changes}))
    return target


def test_loading_what_is_no_reward_model(saved_bert, backbones, tmp_path):
    with pytest.raises(ConfigError, match="no such"):
        RewardModel.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"not a reward model, it has no equipoise\.json"):
        RewardModel.load(backbones["bert"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a model directory"):
        RewardModel.load(tmp_path / "empty")
    policy = tmp_path / "policy"
    shutil.copytree(saved_bert, policy)
    (policy / "equipoise.json").write_text('{"prompt_format": "text"}')
    with pytest.raises(ConfigError, match="has no aspects, offset, input_format"):
        RewardModel.load(policy)
    (policy / "equipoise.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        RewardModel.load(policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": [0.0]}, "expected 3 numbers"),
        ({"offset": [0.0, None, 0.0]}, "expected finite numbers"),
        ({"aspects": {"toxicity": {"mean": 1}}, "offset": [0.0]}, "no `higher_is_better`"),
        ({"aspects": {"other": {"higher_is_better": True}}, "offset": [0.0]}, "names the outputs"),
        ({"input_format": {"format": "poem"}}, "input_format.format"),
    ],
)
def test_loading_a_model_that_contradicts_itself(saved_bert, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        RewardModel.load(broken_copy(saved_bert, tmp_path / "model", **changes))


def test_loading_a_model_with_missing_weights(saved_bert, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(saved_bert, tmp_path / "model")
    tensors = load_file(saved_bert / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are not in the checkpoint \(classifier.weight"):
        RewardModel.load(tmp_path / "model")


def test_input_format_of_a_recipe_is_taken(backbones):
    settings = InputFormatConfig(format="concatenation", separator="[SEP]", max_length=20)
    model = RewardModel.from_backbone(BackboneConfig(model=str(backbones["bert"])), ASPECTS, settings)
    assert model.inputs.format.to_json() == {"format": "concatenation", "separator": "[SEP]", "max_length": 20}


def test_a_policy_of_ours_is_a_fresh_backbone(tmp_path):
    """SFT leaves an equipoise.json with the prompt format beside the weights; it is no earlier reward model."""
    from tests.toy import toy_policy_directory

    from equipoise.models.policy import load_policy

    directory = toy_policy_directory(tmp_path / "base")
    policy = load_policy(str(directory), trainable=True)
    policy.saver()(tmp_path / "sft")
    layout = InputFormatConfig(format="concatenation", separator="please", max_length=16)
    model = RewardModel.from_backbone(BackboneConfig(model=str(tmp_path / "sft")), [Aspect("safety", True)], layout)
    assert model.aspects == ["safety"]
