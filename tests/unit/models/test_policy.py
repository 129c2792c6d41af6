"""Loading, saving and reloading policies; the reference in its three forms; wrong directories."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.toy import plain_model, toy_config, toy_model, toy_policy_directory, toy_rollout, toy_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.config import ModelConfig
from equipoise.errors import CheckpointError, ConfigError
from equipoise.models import policy as policy_file
from equipoise.models.loading import load_config, quiet_peft, resolve_precision, without_dropout
from equipoise.models.policy import Policy, load_policy
from equipoise.models.policy_module import PolicyModule
from equipoise.models.reference import AdapterOff, FrozenAdapter, FrozenModel
from equipoise.rollout.logprobs import completion_logprobs

IDS = torch.tensor([[5, 9, 14, 30, 7, 22, 11]])
ROLLOUT = toy_rollout([3, 5, 2], [4, 2, 6], temperature=0.9)
LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_policy_directory(tmp_path_factory.mktemp("base") / "model", initializer_range=0.2)


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copied"))


def load(directory: Path, **changes: Any) -> Policy:
    options = {name: changes.pop(name) for name in ("trainable", "with_reference", "seed") if name in changes}
    return load_policy(ModelConfig.model_validate({"model": str(directory), **changes}), **options)


def train_a_little(policy: Policy, steps: int = 2) -> None:
    """Move every trained parameter: Adam on the sum of some log-probabilities."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=0.05)
    for _ in range(steps):
        (-completion_logprobs(policy, ROLLOUT).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.module.model(input_ids=IDS).logits


def test_full_model_reloads_through_plain_transformers(base: Path, tmp_path: Path) -> None:
    policy = load(base, trainable=True)
    before = logits(policy)
    train_a_little(policy)
    assert not torch.allclose(logits(policy), before)
    saved = policy.save(tmp_path / "saved")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(saved)(input_ids=IDS).logits, logits(policy))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    text = "please make a cake stupid"
    assert tokenizer(text)["input_ids"] == policy.tokenizer(text)["input_ids"] == toy_tokenizer()(text)["input_ids"]
    assert (saved / "model.safetensors").is_file() and not list(tmp_path.glob(".*")), "nothing temporary is left"
    torch.testing.assert_close(logits(load(saved)), logits(policy))


def test_saving_replaces_what_was_there(base: Path, tmp_path: Path) -> None:
    policy = load(base, trainable=True)
    policy.save(tmp_path / "saved")
    (tmp_path / "saved" / "stale.txt").write_text("old")
    train_a_little(policy)
    policy.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "stale.txt").exists()
    torch.testing.assert_close(logits(load(tmp_path / "saved")), logits(policy))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tied_weights_load_and_save(tmp_path: Path, architecture: str) -> None:
    directory = toy_policy_directory(tmp_path / "m", architecture=architecture, tie_word_embeddings=True)
    policy = load(directory, trainable=True)
    train_a_little(policy)
    saved = policy.save(tmp_path / "saved")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(saved)(input_ids=IDS).logits, logits(policy))
    causal = plain_model(policy)
    assert causal.get_output_embeddings().weight is causal.get_input_embeddings().weight


def test_lora_reloads_through_plain_peft(base: Path, tmp_path: Path) -> None:
    policy = load(base, lora=LORA, trainable=True)
    fresh = logits(policy)
    torch.testing.assert_close(fresh, logits(load(base)), msg="a fresh adapter changes nothing")
    train_a_little(policy)
    saved = policy.save(tmp_path / "saved")
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    with quiet_peft():
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved)
        automatic = peft.AutoPeftModelForCausalLM.from_pretrained(saved)
    torch.testing.assert_close(model(input_ids=IDS).logits, logits(policy))
    torch.testing.assert_close(automatic(input_ids=IDS).logits, logits(policy))
    assert AutoTokenizer.from_pretrained(saved)("please go")["input_ids"] == policy.tokenizer("please go")["input_ids"]


def test_lora_trains_adapters_alone_in_float32(base: Path) -> None:
    policy = load(base, lora=LORA, trainable=True, precision="bfloat16")
    names = [name for name, p in policy.module.named_parameters() if p.requires_grad]
    assert policy.is_lora and names and all("lora_" in name for name in names)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    frozen = {p.dtype for p in policy.module.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    completion_logprobs(policy, ROLLOUT).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.trainable_parameters())


def test_full_training_keeps_float32_weights_under_bfloat16_arithmetic(base: Path) -> None:
    policy = load(base, trainable=True, precision="bfloat16")
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    exact = completion_logprobs(load(base, trainable=True), ROLLOUT)
    rounded = completion_logprobs(policy, ROLLOUT)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)


def test_seeds_of_fresh_adapters_and_random_weights(base: Path) -> None:
    def first(seed: int, **changes: Any) -> Tensor:
        policy = load(base, trainable=True, seed=seed, **changes)
        return next(p for p in policy.trainable_parameters() if bool(p.any())).detach()

    for changes in ({"lora": LORA}, {"initialise": "random"}):
        state = torch.random.get_rng_state()
        assert torch.equal(first(1, **changes), first(1, **changes))
        assert not torch.equal(first(1, **changes), first(2, **changes))
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"


def test_an_adapter_is_continued(base: Path, tmp_path: Path) -> None:
    first = load(base, lora=LORA, trainable=True)
    train_a_little(first)
    saved = first.save(tmp_path / "first")
    second = load(saved, trainable=True, with_reference=True)
    assert isinstance(second.reference, FrozenAdapter) and second.is_lora
    torch.testing.assert_close(logits(second), logits(first))
    train_a_little(second)
    assert not torch.allclose(logits(second), logits(first))
    again = second.save(tmp_path / "second")
    torch.testing.assert_close(logits(load(again)), logits(second))
    with pytest.raises(ConfigError, match=r"is an adapter with its own LoRA settings; remove `policy\.lora`"):
        load(saved, lora=LORA)


def test_an_adapter_finds_its_base_from_any_directory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    saved = load(Path("model"), lora=LORA, trainable=True).save(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert load(saved).is_lora
    Path(shutil.copytree(base, saved / "base"))
    settings = json.loads((saved / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "base"
    (saved / "adapter_config.json").write_text(json.dumps(settings))
    assert load(saved).is_lora, "a relative path counts from the adapter too"


REFERENCES: dict[str, tuple[Callable[[Path, Path], Policy], type]] = {
    "adapter off": (lambda base, out: load(base, lora=LORA, trainable=True, with_reference=True), AdapterOff),
    "frozen adapter": (lambda base, out: load(_adapter(base, out), trainable=True, with_reference=True), FrozenAdapter),
    "frozen model": (lambda base, out: load(base, trainable=True, with_reference=True), FrozenModel),
}


def _adapter(base: Path, out: Path) -> Path:
    policy = load(base, lora=LORA, trainable=True)
    train_a_little(policy)
    return policy.save(out / "adapter")


@pytest.mark.parametrize(("make", "kind"), REFERENCES.values(), ids=REFERENCES)
def test_the_reference_is_the_policy_as_it_was(base: Path, tmp_path: Path, make: Any, kind: type) -> None:
    policy = make(base, tmp_path)
    assert isinstance(policy.reference, kind)
    start = completion_logprobs(policy, ROLLOUT).detach()
    train_a_little(policy, steps=3)
    trained = [p.detach().clone() for p in policy.trainable_parameters()]
    after = completion_logprobs(policy, ROLLOUT).detach()
    assert not torch.allclose(after, start, atol=1e-3)
    found = completion_logprobs(policy.reference, ROLLOUT)
    torch.testing.assert_close(found, start, rtol=0, atol=1e-6)
    assert not found.requires_grad
    for parameter, value in zip(policy.trainable_parameters(), trained, strict=True):
        assert torch.equal(parameter, value) and parameter.requires_grad
    assert torch.equal(completion_logprobs(policy, ROLLOUT).detach(), after)
    if kind is AdapterOff:
        torch.testing.assert_close(found, completion_logprobs(load(base), ROLLOUT), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "mixtral", "cohere"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_in_bfloat16_scores_as_the_policy_did(architecture: str, tied: bool) -> None:
    """To the bit: what autocast rounds at every call is kept rounded, and nothing else is."""
    module = PolicyModule(toy_model(architecture, tie_word_embeddings=tied, initializer_range=0.3), autocast=True)
    reference = FrozenModel(module.eval())
    with reference.active() as frozen:
        kept = {(name.rsplit(".", 2)[-2], p.dtype) for name, p in frozen.causal.named_parameters()}
        for packed in (True, False):
            module.packed = frozen.packed = packed
            assert torch.equal(completion_logprobs(reference, ROLLOUT), completion_logprobs(module, ROLLOUT).detach())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())
    halves = {name for name, dtype in kept if dtype == torch.bfloat16}
    assert halves >= {"q_proj", "o_proj"} or architecture == "gpt2"
    assert ("lm_head" in halves) != tied
    assert not any("norm" in name or "ln_" in name or "embed" in name or "wte" in name for name in halves)


def test_making_a_reference_leaves_the_policy_in_training(base: Path) -> None:
    policy = load(base, trainable=True, precision="bfloat16")
    assert policy.module.training and not FrozenModel(policy.module)._module.training
    assert policy.module.training and all(part.training for part in policy.module.modules())


def test_a_reference_keeps_float32_where_rounding_would_show(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(base, trainable=True, precision="bfloat16")
    head = policy.module.causal.lm_head
    monkeypatch.setattr(  # a layer that reads its weights in float32 although autocast is on
        type(head), "forward", lambda self, x: (x.float()[..., None, :] * self.weight).sum(-1), raising=True
    )
    reference = FrozenModel(policy.module)
    with reference.active() as module:
        assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [make for make, _ in REFERENCES.values()], ids=REFERENCES)
def test_the_policy_is_back_after_an_error_inside_the_reference(base: Path, tmp_path: Path, make: Any) -> None:
    policy = make(base, tmp_path)
    train_a_little(policy)
    before = completion_logprobs(policy, ROLLOUT).detach()
    with pytest.raises(RuntimeError, match="inside"), policy.reference.active():
        raise RuntimeError("inside")
    assert torch.equal(completion_logprobs(policy, ROLLOUT).detach(), before) and torch.is_grad_enabled()


def test_a_reference_follows_the_policy_to_another_device(base: Path) -> None:
    """Accelerate moves the policy after it was loaded; the frozen copies must be there as well ("meta" stands in)."""
    for changes in ({}, {"lora": LORA}):
        policy = load(base, trainable=True, with_reference=True, **changes)
        policy.module.to("meta")
        assert policy.reference is not None
        with policy.reference.active() as module:
            assert {p.device.type for p in module.parameters()} == {"meta"}


def test_no_reference_is_loaded_unless_asked(base: Path) -> None:
    assert load(base, trainable=True).reference is None


def test_modes_and_gradients(base: Path) -> None:
    frozen, trained = load(base), load(base, trainable=True)
    assert not frozen.trainable_parameters() and not frozen.module.training
    assert len(trained.trainable_parameters()) == len(list(trained.module.parameters())) and trained.module.training


def test_dropout_is_off_and_stays_in_the_saved_config(tmp_path: Path) -> None:
    directory = toy_policy_directory(tmp_path / "m", architecture="gpt2")
    policy = load(directory, trainable=True)
    with torch.no_grad():
        assert torch.equal(completion_logprobs(policy, ROLLOUT), completion_logprobs(policy, ROLLOUT))
    saved = json.loads((policy.save(tmp_path / "saved") / "config.json").read_text())
    assert saved["attn_pdrop"] == saved["resid_pdrop"] == saved["embd_pdrop"] == 0.1
    assert plain_model(policy).config.resid_pdrop == 0.0


def test_without_dropout_finds_every_rate() -> None:
    config = toy_config("mixtral", attention_dropout=0.2)
    assert without_dropout(config) == {"attention_dropout": 0.2, "router_jitter_noise": 0.1}
    assert config.attention_dropout == config.router_jitter_noise == 0.0
    assert without_dropout(config) == {}


def test_eos_ids_come_from_the_generation_config_and_the_tokenizer(copied: Path, caplog: Any) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 30]}))
    assert load(copied).eos_ids == (9, 30, 1)
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load(copied).eos_ids == (9, 1)


def test_no_pad_token_means_eos_behind_a_mask(copied: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copied)
    assert load(copied).pad_id == 1


def test_prompt_format_is_remembered(tmp_path: Path) -> None:
    directory = toy_policy_directory(tmp_path / "m", chat=True)
    assert load(directory).prompt_format == "chat"
    policy = load(directory, prompt_format="text")
    assert policy.prompt_format == "text"
    assert load(policy.save(tmp_path / "saved")).prompt_format == "text", "sampled as it was trained"
    assert load(toy_policy_directory(tmp_path / "n")).prompt_format == "text"


def test_context_length(base: Path, tmp_path: Path) -> None:
    assert load(base).context_length == 128
    assert load(toy_policy_directory(tmp_path / "g", architecture="gpt2")).context_length == 128
    assert load(toy_policy_directory(tmp_path / "s", architecture="mamba", layers=1)).context_length is None


def test_precision_by_size() -> None:
    assert resolve_precision("auto", 99_999_999) == "float32" and resolve_precision("auto", 10**8) == "bfloat16"
    assert resolve_precision("float32", 10**12) == "float32"


# -- wrong input -------------------------------------------------------------------------------------------------


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such model directory; give a directory"):
        load_policy(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"not a model directory, it has neither config\.json nor adapter_config"):
        load_policy(tmp_path / "empty")


def test_a_hub_name_without_a_network_is_a_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot read the model's configuration"):
        load_policy("no-such-owner/no-such-model")


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such_type"}', "[]"])
def test_a_broken_config(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"{copied}: cannot read the model's configuration"):
        load_policy(copied)


def test_missing_weights_are_not_filled_with_random_numbers(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are not in the checkpoint \(model\.layers\.0\.mlp\.up_proj"):
        load_policy(copied)


@pytest.mark.parametrize("damage", ["absent", "cut", "garbage", "other shape"])
def test_weights_that_cannot_be_read(copied: Path, damage: str) -> None:
    file = copied / "model.safetensors"
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "garbage":
        file.write_bytes(b"not a safetensors file at all")
    else:
        config = json.loads((copied / "config.json").read_text())
        config["intermediate_size"] = 96
        (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"{copied}: cannot load the model"):
        load_policy(copied)


def test_pickled_weights_are_not_opened(copied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied)
    torch.save(model.state_dict(), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_policy(copied)


def test_code_in_a_model_directory_is_never_run(copied: Path) -> None:
    marker = copied / "executed"
    (copied / "modeling_evil.py").write_text(
        f"open({str(marker)!r}, 'w').write('x')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
        "class EvilForCausalLM(LlamaForCausalLM):\n    config_class = EvilConfig\n"
    )
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
    }
    (copied / "config.json").write_text(json.dumps(config))
    load_policy(copied)  # a known type: loaded by the library's own class
    assert not marker.exists()
    config["model_type"] = "evil"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_policy(copied)
    assert not marker.exists()


def test_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    directory = toy_policy_directory(tmp_path / "m", vocabulary=40)
    with pytest.raises(ConfigError, match=r"vocabulary mismatch: the tokenizer has ids up to \d+, the model embeds 40"):
        load_policy(directory)


def test_an_adapter_of_another_base(base: Path, tmp_path: Path) -> None:
    saved = load(base, lora=LORA, trainable=True).save(tmp_path / "adapter")
    other = toy_policy_directory(tmp_path / "wider", hidden=48)
    settings = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(other)}))
    with pytest.raises(ConfigError, match=f"the adapter does not fit its base {other}"):
        load_policy(saved)
    (saved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="base_model_name_or_path is missing"):
        load_policy(saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: broken JSON"):
        load_policy(saved)


def test_an_adapter_with_a_larger_vocabulary_than_its_base(base: Path, tmp_path: Path) -> None:
    saved = load(base, lora=LORA, trainable=True).save(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    tokenizer.save_pretrained(saved)
    with pytest.raises(ConfigError, match="vocabulary mismatch"):
        load_policy(saved)


def test_lora_that_matches_no_module(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_modules \['no_such_proj'\]: LoRA matches no module of Llama"):
        load(base, lora={**LORA, "target_modules": ["no_such_proj"]}, trainable=True)


def test_a_tokenizer_that_does_not_reload_is_refused_and_nothing_is_left(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(base)
    policy.save(tmp_path / "saved")

    def refuse(*_: Any) -> None:
        raise ConfigError("the tokenizer does not reload")

    monkeypatch.setattr(policy_file, "save_tokenizer_checked", refuse)
    with pytest.raises(ConfigError, match="does not reload"):
        policy.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file(), "what was saved before is still there"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_model_without_eos_warns(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copied)
    (copied / "generation_config.json").write_text("{}")
    config = json.loads((copied / "config.json").read_text())
    config["eos_token_id"] = None
    (copied / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        assert load(copied).eos_ids == ()
    assert any("has no EOS token" in record.getMessage() for record in caplog.records)


def test_config_of_a_directory_is_read(base: Path) -> None:
    assert load_config(str(base)).model_type == "llama"


def test_a_full_disk_keeps_what_was_saved_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(base)
    policy.save(tmp_path / "saved")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy.module.model, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"could not save the policy: .*No space left"):
        policy.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    torch.testing.assert_close(logits(load(tmp_path / "saved")), logits(policy))


def test_weights_given_replace_the_model_s_own(base: Path, tmp_path: Path) -> None:
    policy, other = load(base), load(base, initialise="random")
    saved = policy.save(tmp_path / "saved", state=other.module.model.state_dict())
    torch.testing.assert_close(logits(load(saved)), logits(other))
