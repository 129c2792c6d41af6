"""The two networks of PPO and their optimizer steps: first look at a rollout, losses of a minibatch, state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.algorithms.online import ROWS_WITHOUT_GRADIENT, PolicyObserver, own_passes
from equipoise.algorithms.ppo_critic import Critic, CriticCost, critic_values, shared_look, values_in_chunks
from equipoise.algorithms.ppo_signal import FirstLook, TokenSignal
from equipoise.algorithms.run import Run
from equipoise.algorithms.steps import Updater
from equipoise.config import PPOConfig
from equipoise.functional import clipped_policy_loss, value_loss
from equipoise.models.flops import FlopCounter
from equipoise.models.policy import Policy
from equipoise.rollout.logprobs import score_in_chunks, score_tokens
from equipoise.rollout.types import Rollout

CRITIC = "critic/"  # before the names of a separate critic's tensors and metrics


class Learner:
    """Policy and critic with their optimizers; one of both where the critic is shared."""

    def __init__(self, policy: Policy, critic: Critic | None, config: PPOConfig, run: Run) -> None:
        self.policy, self.critic, self.config, self.run = policy, critic, config, run
        total_updates = config.num_epochs * config.num_minibatches * config.num_steps
        trained = [policy.module] if critic is None else [policy.module, critic.module]
        count = sum(p.numel() for module in trained for p in module.parameters() if p.requires_grad)
        self.cost, self.critic_cost = FlopCounter.of(policy.module), CriticCost(policy, critic)
        self._updater = Updater(policy.module, config.optimizer, total_updates, run)
        policy.wrapped = self._updater.wrapped
        self._critic_updater: Updater | None = None
        if critic is not None:
            optimizer = config.critic.optimizer or config.optimizer
            self._critic_updater = Updater(critic.module, optimizer, total_updates, run)
            critic.wrapped = self._critic_updater.wrapped
        run.set_trainable(count)

    # -- steps -----------------------------------------------------------------------------------------------------

    def first_look(self, rollout: Rollout, seen: PolicyObserver) -> FirstLook:
        """What is computed once on a rollout, before its first update."""
        rows_at_once = self.config.micro_batch_size or ROWS_WITHOUT_GRADIENT
        counts = self.cost.counts(rollout.prompt_ids_BS, rollout.prompt_mask_BS, rollout.completion_mask_BT)
        reference = None
        if self.config.beta > 0:
            reference = score_in_chunks(self.policy.reference, rollout, rows_at_once, with_unit_logprobs=True)
            self.run.count(reference=self.cost.forward(*counts))
        if self.critic is None:
            scores, values_BS = shared_look(self.policy, rollout, rows_at_once)
        else:
            scores = score_in_chunks(self.policy, rollout, rows_at_once, with_entropy=True, with_unit_logprobs=True)
            values_BS = values_in_chunks(self.critic, rollout, rows_at_once)
        self.run.count(forward=self.cost.forward(*counts), critic=self.critic_cost.forward(counts))
        seen.observe(torch.arange(len(rollout)), scores, reference)
        after = rollout.lengths_B[:, None]  # a state lies before each token, and one more after the last
        return FirstLook(
            logprobs_BT=scores.logprobs_BT.cpu(),
            ref_logprobs_BT=reference.logprobs_BT.cpu() if reference is not None else None,
            values_BT=values_BS[:, :-1].cpu(),
            last_values_B=values_BS.gather(1, after).squeeze(1).cpu(),
        )

    def step(self, minibatch: MinibatchLosses, rows: Tensor) -> dict[str, Any]:
        """One optimizer step of the policy, and one of a separate critic."""
        result: dict[str, Any] = dict(self._updater.step(minibatch.passes(rows, minibatch.policy_loss)))
        self.policy.version = self._updater.updates
        if self._critic_updater is not None:
            found = self._critic_updater.step(minibatch.passes(rows, minibatch.critic_loss))
            result |= {f"{CRITIC}{name}": value for name, value in found.items()}
        return result

    def pass_over(self) -> dict[str, Any]:
        """What `step` returns for a minibatch with nothing to train on: nothing moves, the schedules do."""
        result: dict[str, Any] = dict(self._updater.pass_over())
        self.policy.version = self._updater.updates
        if self._critic_updater is not None:
            result |= {f"{CRITIC}{name}": value for name, value in self._critic_updater.pass_over().items()}
        return result

    # -- checkpointing ---------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Trained parameters and optimizer states of policy and critic, by name."""
        tensors = self._updater.tensors()
        if self._critic_updater is not None:
            tensors |= {f"{CRITIC}{name}": tensor for name, tensor in self._critic_updater.tensors().items()}
        return tensors

    def values(self) -> dict[str, Any]:
        """Counters that go into the checkpoint's JSON."""
        critic = self._critic_updater.values() if self._critic_updater is not None else None
        return {**self._updater.values(), "critic": critic}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what `tensors` and `values` returned; a missing or extra tensor is an error."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(CRITIC)}
        self._updater.load(own, values)
        self.policy.version = self._updater.updates
        if self._critic_updater is not None:
            rest = {name.removeprefix(CRITIC): tensors[name] for name in tensors.keys() - own.keys()}
            self._critic_updater.load(rest, values["critic"])


@dataclass
class Totals:
    """Sums over the passes of a step on this process."""

    policy_loss: float = 0.0
    value_loss: float = 0.0
    clipped: float = 0.0  # tokens whose policy gradient the clip cut off
    value_clipped: float = 0.0
    policy_tokens: float = 0.0
    value_tokens: float = 0.0


class MinibatchLosses:
    """Losses of one minibatch as sums over micro-batches; both are means over the minibatch's tokens, everywhere."""

    def __init__(
        self,
        learner: Learner,
        rollout: Rollout,
        look: FirstLook,
        signal: TokenSignal,
        normalizer: float,
        totals: Totals,
    ) -> None:
        self._learner, self._rollout, self._look, self._signal = learner, rollout, look, signal
        self._normalizer, self._totals = normalizer, totals

    def passes(self, global_rows: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Callable[[], Tensor]]:
        """The loss of each micro-batch of this process's rows, as many on every process."""
        own = self._signal.completions.own_rows(global_rows)
        parts = own_passes(own, self._rollout, self._learner.config.micro_batch_size, self._learner.run)
        return [lambda rows=rows: loss(rows) for rows in parts]

    def policy_loss(self, rows: Tensor) -> Tensor:
        """The clipped surrogate of these rows, and the value loss on top where the critic is shared."""
        config, learner, totals = self._learner.config, self._learner, self._totals
        part, index, mask_BT = self._part(rows)
        scores = score_tokens(learner.policy, part, with_values=learner.critic is None)
        logprobs_BT = scores.logprobs_BT
        loss, metrics = clipped_policy_loss(
            logprobs_BT,
            self._at(self._look.logprobs_BT, index, logprobs_BT),
            self._at(self._signal.advantages_BT, index, logprobs_BT),
            mask_BT,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            reduction="token_mean",
            normalizer=self._normalizer,
        )
        tokens = float(mask_BT.sum())
        totals.policy_loss += float(loss.detach())
        totals.clipped += float(metrics["clip_fraction"]) * tokens
        totals.policy_tokens += tokens
        counts = learner.cost.counts(part.prompt_ids_BS, part.prompt_mask_BS, part.completion_mask_BT)
        learner.run.count(
            trained_tokens=int(tokens), forward=learner.cost.forward(*counts), backward=learner.cost.backward(*counts)
        )
        if learner.critic is None:
            assert scores.values_BT is not None
            loss = loss + self._value_loss(scores.values_BT, part, index, mask_BT)
        return loss

    def critic_loss(self, rows: Tensor) -> Tensor:
        """The value loss of these rows under a separate critic."""
        assert self._learner.critic is not None
        part, index, mask_BT = self._part(rows)
        values_BT = critic_values(self._learner.critic, part)[:, :-1]
        return self._value_loss(values_BT, part, index, mask_BT)

    def _value_loss(self, values_BT: Tensor, part: Rollout, index: Tensor, mask_BT: Tensor) -> Tensor:
        config, learner, totals = self._learner.config, self._learner, self._totals
        loss, metrics = value_loss(
            values_BT,
            self._at(self._signal.values_BT, index, values_BT),
            self._at(self._signal.returns_BT, index, values_BT),
            mask_BT,
            epsilon=math.inf if config.value_epsilon is None else config.value_epsilon,
            normalizer=self._normalizer,
        )
        tokens = float(mask_BT.sum())
        totals.value_loss += float(loss.detach())
        totals.value_clipped += float(metrics["clip_fraction"]) * tokens
        totals.value_tokens += tokens
        counts = learner.cost.counts(part.prompt_ids_BS, part.prompt_mask_BS, part.completion_mask_BT)
        learner.run.count(critic=learner.critic_cost.forward(counts) + learner.critic_cost.backward(counts))
        return config.value_coefficient * loss

    def _part(self, rows: Tensor) -> tuple[Rollout, Tensor, Tensor]:
        """These rows of the rollout, their indices on the CPU, and their loss mask.

        A process without rows left still takes part in the collective passes, with an empty mask.
        """
        index = rows if len(rows) else torch.zeros(1, dtype=torch.long)
        part = self._rollout[index].trimmed()
        tokens = part.completion_ids_BT.shape[1]
        mask_BT = self._signal.mask_BT[index][:, :tokens]
        if not len(rows):
            mask_BT = torch.zeros_like(mask_BT)
        return part, index, mask_BT.to(self._learner.policy.device)

    def _at(self, whole_BT: Tensor, index: Tensor, like_BT: Tensor) -> Tensor:
        """These rows of something computed before, in the shape, dtype and place of what is computed now."""
        return whole_BT[index][:, : like_BT.shape[1]].to(like_BT)
