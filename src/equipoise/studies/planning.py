"""What a recipe needs before it is run: memory by phase, and what to change where it does not fit.

Nothing is loaded but configs. Lengths are the recipe's limits unless others are given, so the answer is what the
longest prompts and completions need.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from equipoise.algorithms.online import ROWS_WITHOUT_GRADIENT
from equipoise.config import (
    AnyRecipe,
    BackboneConfig,
    DPOConfig,
    GRPOConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from equipoise.errors import ConfigError
from equipoise.models.footprint import (
    HALF,
    SINGLE,
    Batch,
    Network,
    Terms,
    critic_network,
    model_config_of,
    policy_network,
    reward_network,
    sampling_terms,
    scoring_terms,
)
from equipoise.models.loading import is_adapter, load_config
from equipoise.models.policy import adapter_base
from equipoise.models.reward_backbone import set_dropout
from equipoise.models.reward_model import REWARD_MODEL_FILE
from equipoise.rollout.passes import TOKENS_PER_PASS, tokens_per_pass
from equipoise.studies.planning_allocator import scratch_terms, training_terms

GB = 1e9
USABLE = 0.92  # of a device: the rest is for its context, kernels' scratch space and fragmentation
ROWS_AT_ONCE = 256  # of `generate`
EVALUATION_PROMPTS = 16  # sampled at once by an in-loop evaluation
REWARD_LENGTH = 512  # tokens a reward model reads where its directory does not say


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest prompt and completion; None: the recipe's limits."""

    prompt: int | None = None
    completion: int | None = None


@dataclass(frozen=True)
class Pass:
    """A network at work: `times` passes over this batch, for the time of a step."""

    kind: str  # sample, score, forward or update
    network: Network
    batch: Batch
    times: float
    adapters: bool = True
    projects: bool = True


@dataclass(frozen=True)
class Need:
    """Bytes a recipe needs: what lies there all the time, what each phase adds, and what could not be counted."""

    resident: Terms
    phases: dict[str, Terms]
    passes: dict[str, list[Pass]]
    trained: float  # numbers that an optimizer updates in a step, once for each of its updates
    unknown: tuple[str, ...] = ()

    @cached_property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    def total(self, phase: str) -> float:
        """Bytes in this phase."""
        return sum(self.resident.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        """Bytes at the fullest phase."""
        return self.total(self.peak_phase)

    def terms(self, phase: str) -> Terms:
        """Everything that takes memory in this phase."""
        return {name: value for name, value in {**self.resident, **self.phases[phase]}.items() if value}


@dataclass
class Configs:
    """Where the configs of models come from: files by model name, else the model's own directory or the hub's cache."""

    files: Mapping[str, Path]
    networks: dict[str, Network] = field(default_factory=dict)

    def config(self, name: str) -> Any:
        """The transformers config of a model. Raises ConfigError naming `--config` where there is none."""
        if name in self.files:
            return model_config_of(self.files[name])
        try:
            return load_config(adapter_base(name) if is_adapter(name) else name)
        except ConfigError as error:
            raise ConfigError(f"{error}; or give its config.json: --config {name}=FILE") from error

    def policy(self, config: ModelConfig, *, on_gpu: bool) -> Network:
        """The network of a `policy:` block. A GPU runs the model's own layers."""
        key = config.model_dump_json()
        if key not in self.networks:
            self.networks[key] = policy_network(config, self.config(config.model))
        net = self.networks[key]
        return replace(net, usual=net.usual and not on_gpu)

    def backbone(self, config: BackboneConfig, labels: int, *, on_gpu: bool) -> Network:
        """The network of a reward recipe."""
        model_config = copy.deepcopy(self.config(config.model))
        if config.dropout is not None:
            set_dropout(model_config, config.dropout)
        net = reward_network(
            model_config, labels, precision=config.precision, checkpointing=config.gradient_checkpointing
        )
        return replace(net, usual=net.usual and not on_gpu)


def need_of(config: AnyRecipe, configs: Configs, lengths: Lengths, *, on_gpu: bool) -> Need:
    """What this recipe needs on one device, or in the memory of a machine without one."""
    return _NEEDS[type(config)](config, configs, lengths, on_gpu)


def _cut(limit: int, length: int | None) -> int:
    return limit if length is None else min(limit, length)


# -- algorithms that sample ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Online:
    """Batches of a GRPO or PPO step. P prompts, G completions each."""

    prompts: int
    group: int
    prompt_tokens: int
    completion_tokens: int

    def batch(self, prompts: int, rows: int) -> Batch:
        return Batch(prompts, rows, self.prompt_tokens, self.completion_tokens)

    def sampled(self) -> tuple[Batch, float]:
        """What is sampled at once, and how often."""
        prompts = min(self.prompts, max(1, ROWS_AT_ONCE // self.group))
        return self.batch(prompts, prompts * self.group), self.prompts / prompts

    def rows(self, count: int, total: int) -> tuple[Batch, float]:
        """Parts of `count` rows, as `micro_batch_size` cuts them."""
        count = min(count, total)
        return self.batch(math.ceil(count / self.group), count), total / count

    def groups(self, tokens: int, prompts: int) -> tuple[Batch, float]:
        """Parts of as many whole groups as `tokens` allow, or of a group's rows, as `passes` cuts them."""
        cost = self.prompt_tokens + self.group * self.completion_tokens
        if cost <= tokens:
            parts = math.ceil(prompts / (tokens // cost))
            count = math.ceil(prompts / parts)
            return self.batch(count, count * self.group), parts
        parts = math.ceil(self.group / max(1, (tokens - self.prompt_tokens) // self.completion_tokens))
        return self.batch(1, math.ceil(self.group / parts)), prompts * parts

    def looked_at(self, micro: int | None) -> tuple[Batch, float]:
        """Parts of a pass without gradients, as `score_in_chunks` cuts them."""
        length = self.prompt_tokens + self.completion_tokens
        return self.groups((micro or ROWS_WITHOUT_GRADIENT) * length, self.prompts)

    def trained_on(self, micro: int | None, minibatches: int, *, on_gpu: bool) -> tuple[Batch, float]:
        """Micro-batches of one minibatch."""
        prompts = math.ceil(self.prompts / minibatches)
        if micro is not None:
            return self.rows(micro, prompts * self.group)
        return self.groups(tokens_per_pass("cuda" if on_gpu else "cpu"), prompts)


def _need_online(config: GRPOConfig | PPOConfig, configs: Configs, lengths: Lengths, on_gpu: bool) -> Need:
    net = configs.policy(config.policy, on_gpu=on_gpu)
    shape = _Online(
        config.prompts_per_step,
        config.group_size,
        _cut(config.max_prompt_tokens, lengths.prompt),
        _cut(config.sampling.max_tokens, lengths.completion),
    )
    batch, times = shape.trained_on(config.micro_batch_size, config.num_minibatches, on_gpu=on_gpu)
    looked, looks = shape.looked_at(config.micro_batch_size)
    sampled, waves = shape.sampled()
    updates = config.num_epochs * config.num_minibatches
    resident = {**_resident(net, on_gpu=on_gpu), "reference": _reference(net, config)}
    phases = {"sampling": sampling_terms(net, sampled)}
    passes = {
        "generate": [Pass("sample", net, sampled, waves)],
        "update": [Pass("update", net, batch, times * updates)],
    }
    if config.evaluation is not None:
        held_out = shape.batch(EVALUATION_PROMPTS, EVALUATION_PROMPTS * config.evaluation.samples)
        phases["evaluation"] = sampling_terms(net, held_out)
    unknown = _add_scorers(config, configs, resident, phases, passes, on_gpu=on_gpu)
    if config.beta > 0:
        phases["reference"] = scoring_terms(net, looked, adapters=False, on_gpu=on_gpu)
        passes["reference"] = [Pass("forward", net, looked, looks, adapters=False)]
    if isinstance(config, PPOConfig) or updates > 1 or config.kl_in == "reward":
        phases["first look"] = scoring_terms(net, looked, on_gpu=on_gpu)
        passes["forward"] = [Pass("forward", net, looked, looks)]
    phases["update"] = training_terms(net, batch, math.ceil(times), on_gpu=on_gpu, sampled=phases["sampling"])
    trained = net.trained
    if isinstance(config, PPOConfig) and config.critic.kind == "separate":
        own = config.critic.model
        critic = critic_network(net if own is None else configs.policy(own, on_gpu=on_gpu))
        resident |= {"critic": critic.weights, "critic's moments": critic.moments}
        phases["critic's update"] = training_terms(
            critic, batch, math.ceil(times), projects=False, on_gpu=on_gpu, sampled=phases["sampling"]
        )
        passes["critic"] = [
            Pass("forward", critic, looked, looks, projects=False),
            Pass("update", critic, batch, times * updates, projects=False),
        ]
        trained += critic.trained
    phases["checkpoint"] = {"copies for the checkpoint": 3.0 * SINGLE * trained}
    return Need(resident, phases, passes, trained * updates, unknown)


def _add_scorers(
    config: GRPOConfig | PPOConfig,
    configs: Configs,
    resident: Terms,
    phases: dict[str, Terms],
    passes: dict[str, list[Pass]],
    *,
    on_gpu: bool,
) -> tuple[str, ...]:
    """Reward models, in place; returns those that could not be counted."""
    found = [part for scorer in config.scorers if (part := _scorer(scorer, configs, on_gpu)) is not None]
    known = [part for part in found if not isinstance(part, str)]
    if known:
        resident["reward models"] = float(sum(SINGLE * (part.frozen + part.trained) for part, _ in known))
        phases["scoring"] = max((scoring_terms(*part, projects=False) for part in known), key=lambda t: sum(t.values()))
        rows = config.prompts_per_step * config.group_size
        passes["score"] = [Pass("forward", part, read, rows / read.rows, projects=False) for part, read in known]
    return tuple(part for part in found if isinstance(part, str))


def _resident(net: Network, *, on_gpu: bool) -> Terms:
    return {"weights": net.weights, "Adam's moments": net.moments, **scratch_terms(on_gpu=on_gpu)}


def _reference(net: Network, config: GRPOConfig | PPOConfig) -> float:
    """Nothing under a fresh adapter; a copy of one that training continues from; a copy of a fully trained model."""
    if config.beta == 0 or config.policy.lora is not None:
        return 0.0
    if net.adapted:
        return float(SINGLE * net.trained)
    return net.weights - (HALF * net.linear if net.low else 0)


def _scorer(scorer: Any, configs: Configs, on_gpu: bool) -> tuple[Network, Batch] | str | None:
    """A reward model's network and what it reads at once; its name where it is not there; None for functions."""
    if scorer.reward_model is None:
        return None
    length, labels = REWARD_LENGTH, 1
    file = Path(scorer.reward_model) / REWARD_MODEL_FILE
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        length, labels = int(values["input_format"]["max_length"]), len(values["aspects"])
    elif scorer.reward_model not in configs.files:
        return (
            f"the reward model {scorer.reward_model} (no such directory; --config {scorer.reward_model}=FILE counts it)"
        )
    net = configs.backbone(BackboneConfig(model=scorer.reward_model), labels, on_gpu=on_gpu)
    return net, Batch(scorer.batch_size, scorer.batch_size, 0, length)


# -- algorithms on data ----------------------------------------------------------------------------------------------


def _need_data(config: SFTConfig | DPOConfig, configs: Configs, lengths: Lengths, on_gpu: bool) -> Need:
    net = configs.policy(config.policy, on_gpu=on_gpu)
    sides = 2 if isinstance(config, DPOConfig) else 1
    prompt = min(lengths.prompt or 0, config.max_length - 1)
    response = _cut(config.max_length - prompt, lengths.completion)
    count = config.micro_batch_size or max(1, TOKENS_PER_PASS // (sides * (prompt + response)))
    count = min(count, config.batch_size)
    batch = Batch(count, count * sides, prompt, response)
    times = config.batch_size / count
    phases = {"update": training_terms(net, batch, math.ceil(times), on_gpu=on_gpu)}
    if isinstance(config, DPOConfig):
        phases["reference"] = scoring_terms(net, batch, on_gpu=on_gpu)
    phases["checkpoint"] = {"copies for the checkpoint": 3.0 * SINGLE * net.trained}
    unknown = ()
    if isinstance(config, DPOConfig) and config.evaluation is not None:
        unknown = ("sampling and scoring of the in-loop evaluation",)
    return Need(
        _resident(net, on_gpu=on_gpu), phases, {"update": [Pass("update", net, batch, times)]}, net.trained, unknown
    )


def _need_reward(config: RewardConfig, configs: Configs, lengths: Lengths, on_gpu: bool) -> Need:
    net = configs.backbone(config.model, len(config.aspects), on_gpu=on_gpu)
    count = min(config.micro_batch_size or config.batch_size, config.batch_size)
    length = _cut(config.input.max_length, None if lengths.completion is None else lengths.completion)
    batch = Batch(count, count, 0, length)
    times = config.batch_size / count
    best = 0.0 if on_gpu else float(SINGLE * net.trained)
    resident = {**_resident(net, on_gpu=on_gpu), "best weights so far": best}
    phases = {
        "update": training_terms(net, batch, math.ceil(times), projects=False, on_gpu=on_gpu),
        "checkpoint": {"copies for the checkpoint": 3.0 * SINGLE * net.trained},
    }
    passes = {"update": [Pass("update", net, batch, times, projects=False)]}
    return Need(resident, phases, passes, net.trained)


_NEEDS: dict[type[AnyRecipe], Callable[[Any, Configs, Lengths, bool], Need]] = {
    GRPOConfig: _need_online,
    PPOConfig: _need_online,
    SFTConfig: _need_data,
    DPOConfig: _need_data,
    RewardConfig: _need_reward,
}
