"""Ensembles: the saved model is the members' mean, the disagreement is numpy's, and broken files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.reward_toys import ASPECTS, save_backbone
from transformers import AutoModelForSequenceClassification

from equipoise.config import BackboneConfig
from equipoise.errors import CheckpointError, ConfigError
from equipoise.models.aspects import Aspect
from equipoise.models.ensemble import RewardEnsemble
from equipoise.models.reward_members import ENSEMBLE_FILE, METADATA, mean_and_std, mean_head
from equipoise.models.reward_model import RewardModel

PROMPTS = ["cat dog", "", "fox jam", "hat " * 30, "mean"]
RESPONSES = ["good kind", "no", "low " * 20, "oak", ""]
STDS = torch.tensor([aspect.std for aspect in ASPECTS])
NAMES = [aspect.name for aspect in ASPECTS]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    root = tmp_path_factory.mktemp("backbones")
    return {name: save_backbone(root / name, name) for name in ("bert", "llama", "roberta")}


def new_ensemble(directory: Path, seeds=(11, 12, 13), aspects=ASPECTS) -> RewardModel:
    """Members as training leaves them: far apart, biases other than 0."""
    model = RewardModel.from_backbone(BackboneConfig(model=str(directory)), aspects, None, 1, seeds)
    head = model._backbone.head
    if head.bias is not None:
        torch.nn.init.uniform_(head.bias, -1, 1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def saved(backbones, tmp_path_factory):
    return new_ensemble(backbones["bert"]).save(tmp_path_factory.mktemp("saved") / "model")


def one_head(ensemble: Path, member: int, target: Path) -> RewardModel:
    """The slow twin of a member: a plain directory whose head is that member, loaded as a model of its own."""
    shutil.copytree(ensemble, target)
    members = load_file(target / ENSEMBLE_FILE)
    (target / ENSEMBLE_FILE).unlink()
    weights = load_file(target / "model.safetensors")
    head = next(name for name in weights if name.endswith(("classifier.weight", "score.weight", "out_proj.weight")))
    for last, tensor in members.items():
        weights[head.removesuffix("weight") + last] = tensor[member].contiguous()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    values = json.loads((target / "equipoise.json").read_text())
    del values["members"]
    (target / "equipoise.json").write_text(json.dumps(values))
    return RewardModel.load(target)


@pytest.mark.parametrize("architecture", ["bert", "llama", "roberta"])
def test_mean_and_std_are_those_of_the_members_as_models(architecture: str, backbones, tmp_path):
    """Every member as a model of its own; numpy over their scores; plain transformers for the mean."""
    model = new_ensemble(backbones[architecture])
    before = model.score(PROMPTS, RESPONSES, with_std=True)
    path = model.save(tmp_path / "model")
    loaded = RewardModel.load(path)
    mean_BK, std_BK = loaded.score(PROMPTS, RESPONSES, with_std=True)
    members = [one_head(path, m, tmp_path / f"member{m}").score(PROMPTS, RESPONSES).double().numpy() for m in range(3)]
    scale = STDS.numpy()
    assert np.abs((mean_BK.numpy() - np.mean(members, axis=0)) / scale).max() < 1e-5
    assert np.abs((std_BK.numpy() - np.std(members, axis=0, ddof=1)) / scale).max() < 1e-5
    assert (std_BK / STDS).min() > 1e-3, "the members differ"
    assert torch.equal(loaded.score(PROMPTS, RESPONSES), mean_BK), "the mean is the score, bit by bit"
    for ours, earlier in zip((mean_BK, std_BK), before, strict=True):
        assert ((ours - earlier) / STDS).abs().max() < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True).eval()
    assert plain.config.num_labels == 3
    with torch.no_grad():
        logits = plain(**loaded.encode(PROMPTS, RESPONSES)).logits
    offset = torch.tensor(json.loads((path / "equipoise.json").read_text())["offset"])
    assert offset.shape == (3,)
    assert ((logits + offset - mean_BK) / STDS).abs().max() < 1e-5


def test_mean_and_std_worked():
    mean, std = mean_and_std(torch.tensor([[[1.0], [2.0], [3.0]]]))
    assert mean.tolist() == [[2.0]] and std.tolist() == [[1.0]]
    level = torch.tensor([[[4096.0], [4096.0 + 2**-11]]])  # float32's own square would lose this
    assert mean_and_std(level)[1].item() == pytest.approx(2**-11 / 2**0.5, rel=1e-6)
    assert mean_head({"weight": torch.tensor([[[1.0]], [[3.0]]])})["weight"].tolist() == [[2.0]]


def test_members_are_functions_of_their_own_seeds(backbones):
    first, other = (new_ensemble(backbones["bert"], seeds)._backbone.head.weight for seeds in ((1, 2), (3, 2)))
    assert not torch.equal(first[:3], other[:3]) and torch.equal(first[3:], other[3:])
    assert not torch.equal(first[:3], first[3:])


def test_training_goes_on_from_as_many_members(saved):
    config = BackboneConfig(model=str(saved))
    loaded = RewardModel.load(saved)
    same = RewardModel.from_backbone(config, ASPECTS, None, 1, (7, 8, 9))
    assert torch.equal(same._backbone.head.weight, loaded._backbone.head.weight)
    fewer = RewardModel.from_backbone(config, ASPECTS, None, 1, (7, 8))
    assert fewer.num_members == 2
    assert fewer.native_scale == [aspect.std for aspect in ASPECTS], "fresh heads answer in standardised units"
    single = RewardModel.from_backbone(config, ASPECTS, None, 1)
    assert single.num_members == 0
    assert ((single.score(PROMPTS, RESPONSES) - loaded.score(PROMPTS, RESPONSES)) / STDS).abs().max() < 1e-5


def test_one_member_and_no_members(backbones):
    with pytest.raises(ConfigError, match="at least two members"):
        new_ensemble(backbones["bert"], seeds=(1,))
    model = RewardModel.from_backbone(BackboneConfig(model=str(backbones["bert"])), ASPECTS, None, 1)
    assert model.num_members == 0
    with pytest.raises(ConfigError, match=r"one head.*ensemble: \{members: 4\}.*RewardEnsemble"):
        model.score(["a"], ["b"], with_std=True)


def changed(saved: Path, target: Path, change) -> Path:
    shutil.copytree(saved, target)
    members = load_file(target / ENSEMBLE_FILE)
    aspects = list(NAMES)
    change(members, aspects)
    save_file(members, target / ENSEMBLE_FILE, {METADATA: json.dumps({"aspects": aspects})})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, _: m.update(weight=m["weight"][:2].contiguous()), r"holds .*\(2, 3, 16\).*expected .*\(3, 3, 16\)"),
        (lambda m, _: m.pop("bias"), "expected .*bias"),
        (lambda m, _: m["bias"].__setitem__((0, 0), float("nan")), "bias holds numbers that are not finite"),
        (lambda m, _: m["weight"].__setitem__((1, 2, 3), 9.0), "differs from the model's head.*not saved together"),
        (lambda _, aspects: aspects.__setitem__(1, "calm"), "its aspects are .*calm.*and the model's"),
        (lambda _, aspects: aspects.pop(), "its aspects are"),
    ],
)
def test_broken_members_are_named(saved, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=f"{ENSEMBLE_FILE}: .*{message}"):
        RewardModel.load(changed(saved, tmp_path / "broken", change))


def test_missing_or_unreadable_members(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / ENSEMBLE_FILE).write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RewardModel.load(tmp_path / "model")
    (tmp_path / "model" / ENSEMBLE_FILE).unlink()
    with pytest.raises(CheckpointError, match="no such file, and the model has 3 members"):
        RewardModel.load(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "equipoise.json").read_text())
    for wrong in (1, "3", True, 2.5):
        (tmp_path / "model" / "equipoise.json").write_text(json.dumps({**values, "members": wrong}))
        with pytest.raises(ConfigError, match=r"`members` is .*at least 2"):
            RewardModel.load(tmp_path / "model")


# -- several models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(backbones, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = []
    for seed, architecture in enumerate(("bert", "llama", "roberta")):
        aspects = ASPECTS if seed != 1 else [ASPECTS[2], ASPECTS[0], ASPECTS[1]]
        model = RewardModel.from_backbone(BackboneConfig(model=str(backbones[architecture])), aspects, None, seed)
        paths.append(model.save(root / f"model{seed}"))
    return paths


def test_ensemble_of_models_is_numpy_over_their_scores(models):
    """Columns are matched by name: the second model has another order."""
    ensemble = RewardEnsemble.load(models)
    mean_BK, std_BK = ensemble.score(PROMPTS, RESPONSES, with_std=True)
    by_name = []
    for path in models:
        model = RewardModel.load(path)
        scores = model.score(PROMPTS, RESPONSES).double().numpy()
        by_name.append(np.stack([scores[:, model.aspects.index(name)] for name in NAMES], axis=1))
    scale = STDS.numpy()
    assert ensemble.aspects == NAMES and ensemble.num_members == 3
    assert np.abs((mean_BK.numpy() - np.mean(by_name, axis=0)) / scale).max() < 1e-6
    assert np.abs((std_BK.numpy() - np.std(by_name, axis=0, ddof=1)) / scale).max() < 1e-6
    assert torch.equal(ensemble.score(PROMPTS, RESPONSES, batch_size=32), mean_BK)
    assert ensemble.scored_flops == sum(model.scored_flops for model in ensemble.models) > 0


def test_models_that_do_not_go_together(models, backbones, tmp_path):
    with pytest.raises(ConfigError, match="at least two reward models, got 1"):
        RewardEnsemble.load(models[:1])
    with pytest.raises(ConfigError, match="stands twice"):
        RewardEnsemble.load([models[0], models[1], models[0]])
    config = BackboneConfig(model=str(backbones["bert"]))
    renamed = [*ASPECTS[:2], Aspect("calm", True, (0.0, 1.0), mean=0.2, std=0.1)]
    other = RewardModel.from_backbone(config, renamed, None, 0).save(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"same aspects: .*model0 scores .*safety.*other .*calm"):
        RewardEnsemble.load([models[0], other])
    turned = [*ASPECTS[:2], Aspect("safety", False, (0.0, 1.0), mean=0.2, std=0.1)]
    other = RewardModel.from_backbone(config, turned, None, 0).save(tmp_path / "turned")
    with pytest.raises(ConfigError, match="'safety' means two things"):
        RewardEnsemble.load([models[0], other])
