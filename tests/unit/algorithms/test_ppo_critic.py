"""The critic: which state a value belongs to, what a critic may be, how it is saved."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file
from tests.ppo_twin import naive_values
from tests.toy import grpo_values, toy_policy_directory, toy_rollout, toy_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from equipoise.algorithms.ppo_critic import (
    HEAD_FILE,
    Critic,
    CriticCost,
    critic_values,
    make_critic,
    save_critic,
    shared_look,
    values_in_chunks,
)
from equipoise.algorithms.run import Run
from equipoise.config import PPOConfig
from equipoise.errors import CheckpointError, ConfigError
from equipoise.models.flops import sequence_counts
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.logprobs import score_tokens

LORA = {"r": 2, "alpha": 4}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_policy_directory(tmp_path_factory.mktemp("policy") / "model", initializer_range=0.2, layers=1, hidden=16)


def config_of(model: Path, **changes: Any) -> PPOConfig:
    return PPOConfig.model_validate(grpo_values(model, model) | {"algorithm": "ppo", "group_size": 1} | changes)


def made(directory: Path, out: Path, *, policy: Policy | None = None, **critic: Any) -> tuple[Policy, Critic | None]:
    """Policy and critic of a recipe."""
    config = config_of(directory, critic=critic)
    policy = policy or load_policy(directory, trainable=True, value_head=critic.get("kind") == "shared")
    return policy, make_critic(policy, config, Run(out, config))


def randomised(head: Any) -> None:
    with torch.no_grad():
        head.linear.weight.normal_(generator=torch.Generator().manual_seed(3))
        head.linear.bias.fill_(0.25)


def values_of(policy: Policy, critic: Critic | None, rollout: Any) -> Tensor:
    with torch.no_grad():
        return shared_look(policy, rollout, 2)[1] if critic is None else critic_values(critic, rollout)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_values_are_those_of_the_state_before_each_token_and_after_the_last(
    directory: Path, tmp_path: Path, kind: str
) -> None:
    policy, critic = made(directory, tmp_path / "run", kind=kind)
    head = policy.module.value_head if critic is None else critic.module.value_head
    randomised(head)
    rollout = toy_rollout([4, 1, 2], [3, 6, 1], extra_padding=2)
    values = values_of(policy, critic, rollout)
    backbone = (policy.module if critic is None else critic.module.body).causal.base_model
    for row, length in enumerate((3, 6, 1)):
        with torch.no_grad():
            expected = naive_values(backbone, head.linear, rollout, row)  # type: ignore[union-attr]
        torch.testing.assert_close(values[row, : length + 1], expected, rtol=1e-4, atol=1e-5)
    ids = rollout.completion_ids_BT.clone()
    ids[1, 2] = 63 - ids[1, 2]
    changed = values_of(policy, critic, replace(rollout, completion_ids_BT=ids))[1] - values[1]
    assert changed[:3].abs().max() < 1e-6, "the value before token 2 does not know it"
    assert changed[3:7].abs().min() > 1e-4, "those after it do"


def test_a_shared_look_scores_as_score_tokens_does(directory: Path, tmp_path: Path) -> None:
    policy, _ = made(directory, tmp_path / "run", kind="shared")
    rollout = toy_rollout([4, 1, 2], [3, 6, 1], temperature=0.7)
    scores, values = shared_look(policy, rollout, 2)
    with torch.no_grad():
        expected = score_tokens(policy, rollout, with_entropy=True, with_unit_logprobs=True, with_values=True)
    for ours, theirs in zip(scores[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    mask = rollout.completion_mask_BT
    torch.testing.assert_close(values[:, :-1][mask], expected.values_BT[mask])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_values_do_not_depend_on_which_rows_share_a_pass(directory: Path, tmp_path: Path, kind: str, size: int) -> None:
    """Groups 7, 2, 7, 2 are put together for their passes; the values come back in the rollout's order."""
    policy, critic = made(directory, tmp_path / "run", kind=kind)
    randomised(policy.module.value_head if critic is None else critic.module.value_head)
    rollout = replace(toy_rollout([4, 1, 4, 1], [3, 6, 1, 5]), group_ids_B=torch.tensor([7, 2, 7, 2]))
    found = (
        shared_look(policy, rollout, size)[1] if critic is None else values_in_chunks(critic, rollout, size)
    )  # [4, 7]
    for row, length in enumerate((3, 6, 1, 5)):
        alone = values_of(policy, critic, rollout[slice(row, row + 1)])
        torch.testing.assert_close(found[row, : length + 1], alone[0, : length + 1], rtol=1e-5, atol=1e-5)
    assert found[:, 0].unique().numel() == 4, "rows differ, so that a wrong order shows"


def test_the_last_state_fits_a_full_context(tmp_path: Path) -> None:
    """Learned positions end with the last token: the state after it must not ask for another one."""
    directory = toy_policy_directory(tmp_path / "gpt2", architecture="gpt2", layers=1, hidden=16, n_positions=8)
    for kind in ("shared", "separate"):
        policy, critic = made(directory, tmp_path / kind, kind=kind)
        assert values_of(policy, critic, toy_rollout([3], [5])).shape == (1, 6)


def test_a_separate_critic_is_a_copy_that_learns_apart(directory: Path, tmp_path: Path) -> None:
    policy, critic = made(directory, tmp_path / "run")
    assert critic is not None
    assert not {id(p) for p in policy.module.parameters()} & {id(p) for p in critic.module.parameters()}
    for (name, ours), theirs in zip(critic.module.body.named_parameters(), policy.module.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    trained = {name for name, p in critic.module.named_parameters() if p.requires_grad}
    assert "body.model.lm_head.weight" not in trained and "value_head.linear.weight" in trained
    assert all(p.requires_grad for p in policy.module.parameters()), "freezing the copy's projection froze no policy"
    critic_values(critic, toy_rollout([4, 1], [3, 6])).sum().backward()
    without = [name for name, p in critic.module.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [], "data parallelism would wait for them"


def test_a_tied_embedding_is_trained(tmp_path: Path) -> None:
    directory = toy_policy_directory(tmp_path / "tied", layers=1, hidden=16, tie_word_embeddings=True)
    _, critic = made(directory, tmp_path / "run")
    assert critic is not None
    assert critic.module.body.causal.get_input_embeddings().weight.requires_grad


def test_the_critic_of_a_lora_policy_is_an_adapter_of_its_own(directory: Path, tmp_path: Path) -> None:
    policy = load_policy(config_of(directory, policy={"model": str(directory), "lora": LORA}).policy, trainable=True)
    _, critic = made(directory, tmp_path / "run", policy=policy)
    assert critic is not None
    trained = [name for name, p in critic.module.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "value_head" in name for name in trained) and len(trained) > 2
    saved = save_critic(tmp_path / "critic", policy, critic)
    assert (saved / "adapter_config.json").is_file() and (saved / HEAD_FILE).is_file()


def test_a_full_critic_for_a_lora_policy(directory: Path, tmp_path: Path) -> None:
    policy = load_policy(config_of(directory, policy={"model": str(directory), "lora": LORA}).policy, trainable=True)
    _, critic = made(directory, tmp_path / "run", policy=policy, model={"model": str(directory)})
    assert critic is not None and not critic.body.is_lora
    full = sum(p.numel() for p in critic.module.parameters() if p.requires_grad)
    assert full > 5 * sum(p.numel() for p in policy.trainable_parameters())


def test_saved_critic_loads_again(directory: Path, tmp_path: Path) -> None:
    policy, critic = made(directory, tmp_path / "run")
    assert critic is not None
    randomised(critic.module.value_head)
    rollout = toy_rollout([4, 1], [3, 6])
    for _ in range(2):  # again, over what lies there
        saved = save_critic(tmp_path / "critic", policy, critic)
    assert not list(tmp_path.glob(".critic*"))
    head = load_file(saved / HEAD_FILE)
    body = AutoModelForCausalLM.from_pretrained(saved)
    linear = torch.nn.Linear(16, 1)
    linear.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in head.items()})
    with torch.no_grad():
        expected = naive_values(body.base_model, linear, rollout, 1)
    torch.testing.assert_close(values_of(policy, critic, rollout)[1, :7], expected, rtol=1e-4, atol=1e-5)


def test_saved_shared_critic_is_its_head(directory: Path, tmp_path: Path) -> None:
    policy, critic = made(directory, tmp_path / "run", kind="shared")
    saved = save_critic(tmp_path / "critic", policy, critic)
    assert [path.name for path in saved.iterdir()] == [HEAD_FILE]
    model = policy.save(tmp_path / "model")
    assert not [name for name in load_file(model / "model.safetensors") if "value_head" in name]
    AutoModelForCausalLM.from_pretrained(model)


def test_a_disk_that_does_not_take_the_critic(directory: Path, tmp_path: Path) -> None:
    policy, critic = made(directory, tmp_path / "run", kind="shared")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not save the critic.*--resume"):
        save_critic(tmp_path / "file" / "critic", policy, critic)


def other_tokenizer(directory: Path) -> None:
    values = json.loads(toy_tokenizer().backend_tokenizer.to_str())
    vocabulary = values["model"]["vocab"]
    vocabulary["please"], vocabulary["thanks"] = vocabulary["thanks"], vocabulary["please"]
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(values))
    PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(directory)


def test_a_critic_that_reads_other_tokens_is_refused(directory: Path, tmp_path: Path) -> None:
    other = toy_policy_directory(tmp_path / "other", layers=1, hidden=16)
    other_tokenizer(other)
    with pytest.raises(ConfigError, match=r"critic\.model .*other: its tokenizer differs from that of the policy"):
        made(directory, tmp_path / "run", model={"model": str(other)})


def test_a_critic_that_reads_too_little_is_refused(directory: Path, tmp_path: Path) -> None:
    short = toy_policy_directory(tmp_path / "short", architecture="gpt2", layers=1, hidden=16, n_positions=100)
    with pytest.raises(ConfigError, match=r"critic\.model .*short: reads 100 tokens, .* may have 128; lower"):
        made(directory, tmp_path / "run", model={"model": str(short)})


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_policy_whose_head_does_not_fit_the_recipe(directory: Path, tmp_path: Path, kind: str) -> None:
    policy = load_policy(directory, trainable=True, value_head=kind == "separate")
    wanted = {"separate": "without a value head; load it with value_head=False", "shared": "with a value head"}
    with pytest.raises(ConfigError, match=f"critic.kind '{kind}' needs a policy {wanted[kind]}"):
        made(directory, tmp_path / "run", policy=policy, kind=kind)


def test_sharded_weights_are_refused(directory: Path) -> None:
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=DistributedType.FSDP))
    with pytest.raises(ConfigError, match="algorithm ppo: policy and critic are not sharded; launch without FSDP"):
        make_critic(load_policy(directory, trainable=True), config_of(directory), run)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_critic_with_gradient_checkpointing_has_the_same_gradients(
    directory: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    found = []
    for checkpointing in (False, True):
        source = {"model": str(directory), "lora": lora, "gradient_checkpointing": checkpointing}
        policy = load_policy(config_of(directory, policy=source).policy, trainable=True)
        _, critic = made(directory, tmp_path / str(checkpointing), policy=policy)
        assert critic is not None
        randomised(critic.module.value_head)
        critic_values(critic, toy_rollout([4, 1], [3, 6])).square().sum().backward()
        found.append([p.grad for p in critic.module.parameters() if p.requires_grad])
        assert all(gradient is not None for gradient in found[-1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cost_by_hand(tmp_path: Path) -> None:
    """Hidden 32, 1 layer: 9216 weights, 256 / 2 per pair (see test_policy_flops), a head of 2 x 32 per position.

    A prompt of 2 and a completion of 3: 5 tokens, 15 pairs, 3 positions. The projection is not computed.
    """
    directory = toy_policy_directory(tmp_path / "model", layers=1)
    counts = sequence_counts(torch.ones(1, 2), torch.ones(1, 3))
    policy, critic = made(directory, tmp_path / "a")
    cost = CriticCost(policy, critic)
    body, head = 5 * 18432 + 15 * 128, 3 * 64
    assert cost.forward(counts) == body + head and cost.backward(counts) == 2 * (body + head)
    shared = CriticCost(*made(directory, tmp_path / "b", kind="shared"))
    assert (shared.forward(counts), shared.backward(counts)) == (head, 2 * head)


def test_half_precision_of_a_critic_keeps_its_head_in_float32(directory: Path, tmp_path: Path) -> None:
    policy = load_policy(
        config_of(directory, policy={"model": str(directory), "precision": "bfloat16", "lora": LORA}).policy,
        trainable=True,
    )
    before = copy.deepcopy(policy.module.state_dict())
    _, critic = made(directory, tmp_path / "run", policy=policy)
    assert critic is not None and critic.module.value_head.linear.weight.dtype == torch.float32
    assert values_of(policy, critic, toy_rollout([4, 1], [3, 6])).dtype == torch.float32
    assert all(torch.equal(now, before[name]) for name, now in policy.module.state_dict().items())
