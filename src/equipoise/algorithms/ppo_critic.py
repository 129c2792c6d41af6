"""The critic of PPO: a value head on a network of its own, or on the policy."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import DistributedType
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from equipoise.algorithms.run import Run
from equipoise.config import PPOConfig
from equipoise.errors import CheckpointError, ConfigError
from equipoise.functional import length_mask
from equipoise.functional.masking import masked_fill_zero
from equipoise.models.flops import FlopCounter
from equipoise.models.policy import Policy, load_policy
from equipoise.models.policy_module import PolicyModule, TokenScores, ValueHead
from equipoise.rollout.logprobs import look_parts
from equipoise.rollout.types import Rollout

Counts = tuple[int, float, int]
HEAD_FILE = "value_head.safetensors"


class CriticModule(nn.Module):
    """A backbone and a value head; the vocabulary projection of the language model is not used and not trained."""

    def __init__(self, body: PolicyModule) -> None:
        super().__init__()
        self.body = body
        self.value_head = ValueHead(body.causal.config.get_text_config().hidden_size)
        backbone = {id(parameter) for parameter in body.causal.base_model.parameters()}
        for parameter in body.causal.parameters():
            if id(parameter) not in backbone:  # data parallelism would wait for its gradient for ever
                parameter.requires_grad_(False)
        trained = next((p for p in body.parameters() if p.requires_grad), next(body.parameters()))
        self.value_head.to(device=trained.device, dtype=trained.dtype)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, num_tokens: int) -> Tensor:
        """Values of the states before each of the last `num_tokens` columns, and after the last one: [B, T + 1]."""
        with self.body.precision_context():
            hidden_BLH = self.body.hidden_states(ids_BL, mask_BL, first=ids_BL.shape[1] - num_tokens)
        return self.value_head(hidden_BLH[:, -num_tokens - 1 :])


@dataclass
class Critic:
    """A critic with a network of its own; `wrapped` is what a gradient step goes through."""

    module: CriticModule
    body: Policy  # the network as a policy, for its tokenizer and its way to be saved
    wrapped: nn.Module | None = None


def make_critic(policy: Policy, config: PPOConfig, run: Run) -> Critic | None:
    """The separate critic that the recipe asks for, None where the policy carries the value head itself.

    Call it before the policy is wrapped. Raises ConfigError for a policy whose value head does not fit the recipe, a
    critic that reads other tokens than the policy writes or fewer of them, and for sharded weights.
    """
    if run.accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError("algorithm ppo: policy and critic are not sharded; launch without FSDP (--multi_gpu alone)")
    has_head = policy.module.value_head is not None
    if has_head != (config.critic.kind == "shared"):
        raise ConfigError(
            f"critic.kind {config.critic.kind!r} needs a policy {'without' if has_head else 'with'} a value head; "
            f"load it with value_head={not has_head}"
        )
    if has_head:
        return None
    if config.critic.model is None:
        # What the policy is at its start, whichever way it was loaded.
        body = replace(policy, module=copy.deepcopy(policy.module), reference=None, wrapped=None)
    else:
        body = load_policy(config.critic.model, trainable=True, seed=config.seed, device=policy.device)
        _check_reads(policy, body, config)
    module = CriticModule(body.module)
    module.train()
    return Critic(module, body)


def _check_reads(policy: Policy, critic: Policy, config: PPOConfig) -> None:
    if policy.tokenizer.get_vocab() != critic.tokenizer.get_vocab():
        raise ConfigError(
            f"critic.model {critic.name}: its tokenizer differs from that of the policy {policy.name}, whose tokens it "
            "would have to read; use a model with the same tokenizer, or leave critic.model out"
        )
    longest = config.max_prompt_tokens + config.sampling.max_tokens
    longest = min(longest, policy.context_length or longest)
    if critic.context_length is not None and critic.context_length < longest:
        raise ConfigError(
            f"critic.model {critic.name}: reads {critic.context_length} tokens, prompt and completion may have "
            f"{longest}; lower max_prompt_tokens or sampling.max_tokens, or use another model"
        )


def critic_values(critic: Critic, rollout: Rollout) -> Tensor:
    """Values of the states before each completion token and after the last column [B, T + 1]; padding is not masked."""
    ids = torch.cat([rollout.prompt_ids_BS, rollout.completion_ids_BT], dim=1)
    mask = torch.cat([rollout.prompt_mask_BS, rollout.completion_mask_BT], dim=1)
    wrapped = critic.wrapped if torch.is_grad_enabled() else None
    return (wrapped if wrapped is not None else critic.module)(ids, mask, rollout.completion_ids_BT.shape[1])


def values_in_chunks(critic: Critic, rollout: Rollout, micro_batch_size: int) -> Tensor:
    """`critic_values` without gradients, a part at a time as `look_parts` has them, rows in the order they came in."""
    parts = look_parts(critic.module.body, rollout, micro_batch_size)
    with torch.no_grad():
        values = torch.cat([critic_values(critic, rollout[part]) for part in parts])
    return values[torch.cat(parts).argsort().to(values.device)]


def shared_look(policy: Policy, rollout: Rollout, micro_batch_size: int) -> tuple[TokenScores, Tensor]:
    """Scores of the completion tokens, and values as `critic_values` has them, from the same passes, no gradients.

    Parts are as in `values_in_chunks`.
    """
    parts = look_parts(policy.module, rollout, micro_batch_size)
    back = torch.cat(parts).argsort().to(policy.device)
    looks = [_shared_part(policy, rollout[part]) for part in parts]
    logprobs, entropy, unit, values = (torch.cat(column)[back] for column in zip(*looks, strict=True))
    return TokenScores(logprobs, entropy, unit, None), values


def _shared_part(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, log-probabilities at temperature 1 [B, T] and values [B, T + 1] of one pass.

    A column that nothing attends to is added on the right, so that there is a state before it in every row.
    """
    ones = torch.ones(len(rollout), 1, dtype=torch.long, device=rollout.prompt_ids_BS.device)
    ids = torch.cat([rollout.prompt_ids_BS, rollout.completion_ids_BT, policy.pad_id * ones], dim=1)
    mask = torch.cat([rollout.prompt_mask_BS, rollout.completion_mask_BT, torch.zeros_like(ones).bool()], dim=1)
    tokens = rollout.completion_ids_BT.shape[1]
    with torch.no_grad():
        scores = policy.module(
            ids,
            mask,
            length_mask(rollout.lengths_B + 1, tokens + 1),
            temperature=rollout.temperature,
            with_entropy=True,
            with_unit_logprobs=True,
            with_values=True,
        )
    completion = rollout.completion_mask_BT
    logprobs, entropy, unit = (masked_fill_zero(part[:, :tokens], completion) for part in scores[:3])
    return logprobs, entropy, unit, scores.values_BT


class CriticCost:
    """FLOPs of the critic; a shared one costs its head alone, the rest is the policy's."""

    def __init__(self, policy: Policy, critic: Critic | None) -> None:
        self._body = FlopCounter.of(critic.module.body) if critic is not None else None
        network = (critic.body if critic is not None else policy).module
        self._head = 2.0 * network.causal.config.get_text_config().hidden_size

    def forward(self, counts: Counts) -> float:
        """Of a forward pass over these (tokens, pairs, completion tokens)."""
        tokens, pairs, positions = counts
        return self._head * positions + (self._body.forward(tokens, pairs, 0) if self._body is not None else 0.0)

    def backward(self, counts: Counts) -> float:
        """Of the backward pass."""
        tokens, pairs, positions = counts
        body = self._body.backward(tokens, pairs, 0) if self._body is not None else 0.0
        return 2 * self._head * positions + body


def save_critic(directory: Path, policy: Policy, critic: Critic | None) -> Path:
    """Write the critic: its network as the policy's is written (a shared one has none of its own), and its head.

    Raises CheckpointError where the disk does not take it.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    head = policy.module.value_head if critic is None else critic.module.value_head
    assert head is not None
    try:
        if critic is None:
            temporary.mkdir(parents=True)
        else:
            critic.body.save(temporary)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
        save_file(tensors, temporary / HEAD_FILE)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory}: could not save the critic: {error}; free space and run again with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory
