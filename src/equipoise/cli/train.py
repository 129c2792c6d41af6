"""`equipoise train`: load what a recipe names, hand it to the algorithm, show progress."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from equipoise.algorithms.conditioning import Conditioning
from equipoise.algorithms.constraints import check_kinds
from equipoise.algorithms.dpo import train_dpo
from equipoise.algorithms.grpo import train_grpo
from equipoise.algorithms.grpo_signal import Objectives
from equipoise.algorithms.ppo import train_ppo
from equipoise.algorithms.run import Run
from equipoise.algorithms.sft import train_sft
from equipoise.algorithms.stopping import LAST_STEP, explained
from equipoise.cli.progress import TrainingProgress
from equipoise.config import AnyRecipe, DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig, load_recipe
from equipoise.data import PairRecord, PromptRecord, load_demonstrations, load_pairs, load_prompts, prompt_text
from equipoise.errors import ConfigError
from equipoise.models.policy import Policy, load_policy
from equipoise.rollout.scorers import build_scorers

logger = logging.getLogger("equipoise")


def train_recipe(recipe: Path, overrides: list[str], out: Path | None, resume: bool) -> None:
    """Train what the recipe says into `out`. Everything that can be wrong with the input is said before training."""
    config = load_recipe(recipe, overrides)
    directory = out or Path(config.out or Path("runs") / recipe.stem)
    run = Run(directory, config, resume=resume, accelerator=Accelerator())
    _warn_of_missing_processes(run)
    if resume and run.is_complete:
        if run.is_main:
            print(f"{directory}: already complete{_why(run)}; the result is in {run.model_directory}", file=sys.stderr)
        return
    try:
        TRAINERS[type(config)](config, run)
    except ConfigError as error:
        raise error if str(recipe) in str(error) else ConfigError(f"{recipe}: {error}") from error
    if run.is_main:
        print(f"done: {run.model_directory}", file=sys.stderr)


def _why(run: Run) -> str:
    """What ended a complete run before its last step, if anything did."""
    if run.stopped is None or run.stopped["rule"] == LAST_STEP:
        return ""
    return f" (it ended after step {run.stopped['step']}: {explained(run.stopped)})"


def end_processes() -> None:
    """Close the connections of a distributed run: gloo aborts a process that exits with them open."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _warn_of_missing_processes(run: Run) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, unless MPI is there, and says nothing."""
    if run.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "accelerate launch asked for several processes and started one: --cpu needs MPI for more. Use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ... for N processes on the CPU"
        )


def _train_sft(config: SFTConfig, run: Run) -> None:
    records = load_demonstrations(config.data)
    policy = load_policy(config.policy, trainable=True, seed=config.seed, device=run.accelerator.device)
    _announce(policy, run)
    with TrainingProgress(run):
        train_sft(policy, records, config, run)


def _train_reward(config: RewardConfig, run: Run) -> None:
    from equipoise.algorithms.reward_regression import train_reward

    if run.accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError("algorithm reward: reward models are not sharded; launch without FSDP (--multi_gpu alone)")
    with TrainingProgress(run):
        train_reward(config, run)


def _train_online(config: GRPOConfig | PPOConfig, run: Run) -> None:
    prompts = load_prompts(config.data)
    held_out = load_prompts(config.evaluation.prompts) if config.evaluation else []
    _warn_of_shared_prompts(prompts, held_out)
    scorers = build_scorers(config.scorers)
    objectives = Objectives.of(config, scorers)
    check_kinds(objectives.constraints, prompts)  # before a large model is loaded
    conditioning = Conditioning.of(config, objectives) if isinstance(config, GRPOConfig) else None
    policy = load_policy(
        config.policy,
        trainable=True,
        with_reference=config.beta > 0,
        value_head=isinstance(config, PPOConfig) and config.critic.kind == "shared",
        seed=config.seed,
        device=run.accelerator.device,
    )
    _announce(policy, run)
    evaluate = None
    if config.evaluation is not None:
        from equipoise.evaluation import make_evaluation_callback

        in_loop = config.evaluation.model_copy(update={"sampling": config.evaluation.sampling or config.sampling})
        if conditioning is not None:
            held_out = conditioning.asking_usual(held_out)
        evaluate = make_evaluation_callback(
            policy,
            held_out,
            scorers,
            config.objective_weights,
            in_loop,
            config.seed,
            max_prompt_tokens=config.max_prompt_tokens,
        )
    with TrainingProgress(run):
        if isinstance(config, PPOConfig):
            train_ppo(policy, scorers, prompts, config, run, evaluate=evaluate)
        else:
            train_grpo(policy, scorers, prompts, config, run, evaluate=evaluate)


def _train_dpo(config: DPOConfig, run: Run) -> None:
    pairs = load_pairs(config.data)
    held_out = load_prompts(config.evaluation.prompts) if config.evaluation else []
    _warn_of_shared_prompts(pairs, held_out)
    scorers = build_scorers(config.scorers)  # before a large model is loaded
    policy = load_policy(config.policy, trainable=True, seed=config.seed, device=run.accelerator.device)
    _announce(policy, run)
    evaluate = None
    if config.evaluation is not None:
        from equipoise.evaluation import make_evaluation_callback

        evaluate = make_evaluation_callback(
            policy,
            held_out,
            scorers,
            config.objective_weights,
            config.evaluation,
            config.seed,
            max_prompt_tokens=config.max_length,
        )
    with TrainingProgress(run):
        train_dpo(policy, pairs, config, run, evaluate=evaluate)


def _warn_of_shared_prompts(training: Sequence[PromptRecord | PairRecord], held_out: Sequence[PromptRecord]) -> None:
    """In-loop evaluation on prompts that are trained on says nothing about others."""
    trained = {prompt_text(record.prompt) for record in training}
    shared = sum(prompt_text(record.prompt) in trained for record in held_out)
    if shared:
        logger.warning(
            "evaluation.prompts: %d of %d prompts are training prompts too, so they are not held out; "
            "give prompts that `data` does not hold",
            shared,
            len(held_out),
        )


TRAINERS: dict[type[AnyRecipe], Callable[[Any, Run], None]] = {
    SFTConfig: _train_sft,
    RewardConfig: _train_reward,
    GRPOConfig: _train_online,
    PPOConfig: _train_online,
    DPOConfig: _train_dpo,
}


def _announce(policy: Policy, run: Run) -> None:
    if run.is_main:
        trained = sum(p.numel() for p in policy.trainable_parameters())
        reference = f", reference: {policy.reference.description}" if policy.reference else ""
        print(
            f"{policy.name}: training {trained:,} parameters in {policy.precision}, prompts as {policy.prompt_format}"
            f"{reference}",
            file=sys.stderr,
        )
