"""One frozen schema per algorithm; `RECIPES` is the table by the name a recipe gives as `algorithm:`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from equipoise.config.objectives import ConditionedConfig, ConstraintConfig, DiagnosticsConfig, ScheduleConfig
from equipoise.config.schema import (
    AspectConfig,
    BudgetConfig,
    DataSources,
    InLoopEvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    Recipe,
    SamplingConfig,
    Schema,
    Scorers,
    StopConfig,
    Weight,
)
from equipoise.config.uncertainty import EnsembleConfig, PessimismConfig


class SFTConfig(Recipe):
    """Supervised fine-tuning on demonstrations."""

    algorithm: Literal["sft"] = "sft"
    policy: ModelConfig = Field(description="The model to train.")
    data: DataSources = Field(description="Demonstrations: prompt and response.")
    validation_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of prompts held out for the validation loss; 0: none."
    )
    max_length: int = Field(
        default=1024,
        ge=2,
        description="Longest prompt plus response in tokens; prompts are cut from the left.",
    )
    num_epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    batch_size: int = Field(default=16, ge=1, description="Demonstrations per optimizer step, over all processes.")
    micro_batch_size: int | None = Field(default=None, ge=1, description="Demonstrations per forward pass.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-4), description="Optimizer."
    )
    evaluate_every: int = Field(default=100, ge=1, description="Steps between validation losses.")
    budget: BudgetConfig | None = Field(default=None, description="Ends training early when it is spent.")

    @model_validator(mode="after")
    def _budget_can_be_reached(self) -> SFTConfig:
        _check_nothing_is_generated(self.budget, "sft")
        return self


class InputFormatConfig(Schema):
    """How prompt and response become the reward model's tokens."""

    format: Literal["pair", "chat", "concatenation"] = Field(
        default="pair",
        description="pair: the tokenizer's two-segment form; chat: its chat template; concatenation: with `separator`.",
    )
    separator: str = Field(default="\n", description="Between prompt and response in `concatenation`.")
    max_length: int = Field(
        default=512, ge=8, description="Tokens; the prompt is cut from the left, the response kept."
    )


class BackboneConfig(Schema):
    """The network under the reward heads: any encoder or decoder with a sequence-classification class."""

    model: str = Field(description="Hub name or directory.")
    revision: str | None = Field(default=None, description="Hub revision.")
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the model. Off: think twice.")
    initialise: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="`random` builds the architecture in config.json with seeded random weights.",
    )
    precision: Precision = Field(default="auto", description="Arithmetic of the forward pass; weights stay float32.")
    gradient_checkpointing: bool = Field(default=False, description="Trade a second forward pass for memory.")
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Overrides every dropout rate in the model's config; null: its own.",
    )


class RewardConfig(Recipe):
    """Multi-label reward regression: one network, one output per aspect."""

    algorithm: Literal["reward"] = "reward"
    model: BackboneConfig = Field(description="Backbone.")
    data: DataSources = Field(description="Scored responses; rows keep their `split` if they carry one.")
    aspects: dict[str, AspectConfig] = Field(min_length=1, description="Aspects to learn, in order of the outputs.")
    input: InputFormatConfig = Field(default_factory=InputFormatConfig, description="Input format.")
    ensemble: EnsembleConfig | None = Field(
        default=None, description="Several heads for each aspect, whose disagreement is the uncertainty; null: one."
    )
    loss: Literal["mse", "huber"] = Field(default="mse", description="On standardised labels, missing ones masked.")
    aspect_balance: Literal["labels", "equal"] = Field(
        default="labels",
        description="labels: every label counts the same; equal: every aspect does, and no small set is drowned.",
    )
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5, description="Of prompts, where rows have no split.")
    test_fraction: float = Field(default=0.1, ge=0, lt=0.5, description="Of prompts, where rows have no split.")
    num_epochs: int = Field(default=3, ge=1, description="Most passes over the training split.")
    batch_size: int = Field(default=32, ge=1, description="Responses per optimizer step, over all processes.")
    micro_batch_size: int | None = Field(default=None, ge=1, description="Responses per forward pass.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-5, schedule="linear"),
        description="Optimizer.",
    )
    evaluate_every: int | None = Field(
        default=None, ge=1, description="Steps between validations; null: at the end of every epoch."
    )
    patience: int | None = Field(
        default=2,
        ge=1,
        description="Stop after this many validations without improvement; null: never. "
        "The best validated weights are the ones saved.",
    )


class CombineConfig(Schema):
    """How several objectives become one advantage."""

    method: str = Field(default="weighted_sum", description="A name from the table of `combine_objectives`.")
    delta: float = Field(default=1e-4, gt=0, description="Added to standard deviations before dividing.")
    options: dict[str, float | int | str | bool] = Field(default_factory=dict, description="The method's own options.")


class GRPOConfig(Recipe):
    """Multi-objective group relative policy optimisation."""

    algorithm: Literal["grpo"] = "grpo"
    policy: ModelConfig = Field(description="The model to align.")
    data: DataSources = Field(description="Training prompts.")
    scorers: Scorers = Field(min_length=1, description="Where scores come from; every aspect has one source.")
    objective_weights: dict[str, Weight] = Field(
        min_length=1,
        description="Weight by aspect name, one for every aspect the scorers give; 0 logs it only.",
    )
    weights_schedule: ScheduleConfig | None = Field(
        default=None, description="Weights that change in training, from `objective_weights`; null: they stay."
    )
    constraints: dict[str, ConstraintConfig] | None = Field(
        default=None,
        description="Levels to keep, by aspect name or `length` (completion tokens): "
        "`{safety: {min: 0.9, margin: 0.04, on: adversarial}}`; null: none.",
    )
    pessimism: PessimismConfig | None = Field(
        default=None, description="Train on utilities less kappa times the ensemble's disagreement; null: the means."
    )
    conditioned: ConditionedConfig | None = Field(
        default=None,
        description="Every prompt of a step gets weights of its own and names them to the policy; their sum, and what "
        "the in-loop evaluation asks for, is that of `objective_weights`; null: off.",
    )
    combine: CombineConfig = Field(default_factory=CombineConfig, description="Combination of objectives.")
    num_steps: int = Field(ge=1, description="Steps: each samples, scores and updates.")
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts per step, over all processes.")
    group_size: int = Field(default=8, ge=2, description="Completions per prompt; one has nothing to be compared with.")
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longer prompts are cut from the left and counted.")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="How completions are drawn.")
    beta: float = Field(default=0.04, ge=0, description="Weight of the KL term; 0 computes no reference.")
    kl_in: Literal["loss", "reward"] = Field(
        default="loss",
        description="loss: a term of every token; reward: beta times the completion's summed k1 is taken off its "
        "reward (RLOO), with combine.method weighted_sum.",
    )
    kl_loss: Literal["k3_weighted", "k3", "k2"] = Field(
        default="k3_weighted",
        description="With kl_in loss. k3_weighted: gradient of KL(policy||reference); k3: the paper's, "
        "KL(reference||policy); k2.",
    )
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="Clip range of the ratio, below (and above).")
    epsilon_high: float | None = Field(default=None, gt=0, description="Clip range above, if another (clip-higher).")
    ratio: Literal["token", "sequence"] = Field(default="token", description="Importance ratio per token or sequence.")
    reduction: Literal["sequence_mean", "token_mean", "constant"] = Field(
        default="sequence_mean", description="How token losses are averaged."
    )
    constant: float | None = Field(default=None, gt=0, description="Divisor of `constant`; null: sampling.max_tokens.")
    num_epochs: int = Field(default=1, ge=1, description="Passes over each rollout.")
    num_minibatches: int = Field(
        default=1, ge=1, description="Optimizer steps per pass; groups of one prompt stay together."
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Completions per forward pass; changes memory, not the result. null: groups of about 8,192 tokens, "
        "2,048 on a CPU.",
    )
    scale: Literal["std", "none", "batch", "leave_one_out"] = Field(
        default="std",
        description="What centred rewards are divided by in `weighted_sum`: group std, nothing, batch std; "
        "leave_one_out: nothing, the mean being that of the other completions (RLOO).",
    )
    zero_variance: Literal["keep", "skip"] = Field(
        default="keep",
        description="Groups without a signal: keep (their KL term and their place in the mean) or skip (neither).",
    )
    mask_truncated: bool = Field(
        default=False,
        description="Leave completions cut at max_tokens out of the loss and of its normaliser.",
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6), description="Optimizer."
    )
    evaluation: InLoopEvaluationConfig | None = Field(default=None, description="In-loop evaluation.")
    stop: StopConfig | None = Field(default=None, description="Ends training early; null: it runs all `num_steps`.")
    budget: BudgetConfig | None = Field(default=None, description="Ends training early when it is spent.")
    completions_every: int = Field(default=1, ge=1, description="Steps between completions/step_*.parquet files.")
    diagnostics: DiagnosticsConfig | None = Field(default=None, description="Measured on demand; null: nothing.")

    @model_validator(mode="after")
    def _training_samples_the_policy_itself(self) -> GRPOConfig:
        _check_online(self)
        if self.scale != "std" and self.combine.method != "weighted_sum":
            raise ValueError(f"scale {self.scale!r} applies to combine.method weighted_sum only")
        if self.scale == "leave_one_out" and self.reduction == "sequence_mean":
            # E[(1/|y|) grad log p(y)] is the gradient of E[1/|y|], not 0: what is subtracted is no baseline any more.
            raise ValueError(
                "scale 'leave_one_out' is unbiased for the summed log-probability of a completion, and reduction "
                "sequence_mean divides it by the completion's own length; use reduction constant or token_mean, or "
                "scale none"
            )
        if self.kl_in == "reward" and self.combine.method != "weighted_sum":
            raise ValueError("kl_in 'reward' applies to combine.method weighted_sum only: gdpo would rescale beta away")
        if self.constant is not None and self.reduction != "constant":
            raise ValueError(f"constant ({self.constant}) applies to reduction constant only, not {self.reduction}")
        if self.kl_in == "reward" and "kl_loss" in self.model_fields_set:
            raise ValueError(f"kl_loss {self.kl_loss!r} has no effect with kl_in 'reward' (k1); remove kl_loss")
        if self.kl_in == "reward" and self.beta == 0:
            raise ValueError("kl_in 'reward' with beta 0 penalises nothing; give beta a value above 0, or remove kl_in")
        return self

    @model_validator(mode="after")
    def _conditioned_prompts_weigh_for_themselves(self) -> GRPOConfig:
        if self.conditioned is None:
            return self
        if sum(weight > 0 for weight in self.objective_weights.values()) < 2:
            raise ValueError("conditioned: weighs at least 2 objectives; give so many an objective_weights above 0")
        if self.weights_schedule is not None:
            raise ValueError("conditioned: the weights of every prompt are drawn; remove weights_schedule")
        if self.constraints is not None:
            raise ValueError(
                "conditioned: a constraint would hold for the mean over the weights drawn, and not for those asked at "
                "inference; remove constraints"
            )
        if self.scale == "batch":
            raise ValueError("conditioned: scale 'batch' looks across groups, whose weights differ; use std or none")
        return self


class CriticConfig(Schema):
    """The network that predicts the score to come, token by token."""

    kind: Literal["separate", "shared"] = Field(
        default="separate",
        description="separate: a value head on a network of its own; shared: a value head on the policy itself.",
    )
    model: ModelConfig | None = Field(
        default=None,
        description="What a separate critic starts from, with the policy's tokenizer; null: a copy of the policy.",
    )
    optimizer: OptimizerConfig | None = Field(
        default=None, description="Optimizer of a separate critic; null: the same settings as the policy's."
    )

    @model_validator(mode="after")
    def _a_shared_critic_has_nothing_of_its_own(self) -> CriticConfig:
        if self.kind == "shared" and (self.model is not None or self.optimizer is not None):
            raise ValueError("a shared critic is trained with the policy: remove critic.model and critic.optimizer")
        return self


class AdaptiveKLConfig(Schema):
    """Proportional control of beta, so that the KL to the reference comes to a target."""

    target: float = Field(gt=0, description="Nats per completion, at the sampling temperature.")
    horizon: int = Field(
        default=10_000, ge=1, description="Completions in which an error of 1% moves beta by 1%; at most 20% counts."
    )


class PPOConfig(Recipe):
    """Proximal policy optimisation of a weighted sum of scores, with a critic."""

    algorithm: Literal["ppo"] = "ppo"
    policy: ModelConfig = Field(description="The model to align.")
    data: DataSources = Field(description="Training prompts.")
    scorers: Scorers = Field(min_length=1, description="Where scores come from; every aspect has one source.")
    objective_weights: dict[str, Weight] = Field(
        min_length=1,
        description="Weight by aspect name, one for every aspect the scorers give; 0 logs it only.",
    )
    weights_schedule: ScheduleConfig | None = Field(
        default=None, description="Weights that change in training, from `objective_weights`; null: they stay."
    )
    constraints: dict[str, ConstraintConfig] | None = Field(
        default=None,
        description="Levels to keep, by aspect name or `length` (completion tokens): "
        "`{safety: {min: 0.9, margin: 0.04, on: adversarial}}`; null: none.",
    )
    pessimism: PessimismConfig | None = Field(
        default=None, description="Train on utilities less kappa times the ensemble's disagreement; null: the means."
    )
    num_steps: int = Field(ge=1, description="Steps: each samples, scores and updates.")
    prompts_per_step: int = Field(default=64, ge=1, description="Prompts per step, over all processes.")
    group_size: int = Field(default=1, ge=1, description="Completions per prompt.")
    max_prompt_tokens: int = Field(default=512, ge=1, description="Longer prompts are cut from the left and counted.")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="How completions are drawn.")
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(default=0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="Clip range of the ratio, below (and above).")
    epsilon_high: float | None = Field(default=None, gt=0, description="Clip range above, if another (clip-higher).")
    value_epsilon: float | None = Field(
        default=0.2, gt=0, description="How far a value may move from the old one, in units of the return; null: any."
    )
    value_coefficient: float = Field(
        default=0.1, gt=0, description="Weight of the value loss; for a separate critic it matters to clipping only."
    )
    critic: CriticConfig = Field(default_factory=CriticConfig, description="The critic.")
    beta: float = Field(
        default=0.05, ge=0, description="Weight of the KL penalty in each token's reward; 0 computes no reference."
    )
    adaptive_kl: AdaptiveKLConfig | None = Field(
        default=None, description="Moves beta towards a target KL, starting from `beta`; null: beta stays."
    )
    whiten_rewards: bool = Field(
        default=False, description="Scale the step's token rewards about their mean to standard deviation 1."
    )
    whiten_advantages: bool = Field(
        default=True, description="Shift and scale the step's token advantages to mean 0 and standard deviation 1."
    )
    num_epochs: int = Field(default=4, ge=1, description="Passes over each rollout.")
    num_minibatches: int = Field(
        default=1, ge=1, description="Optimizer steps per pass; groups of one prompt stay together."
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Completions per forward pass; changes memory, not the result. null: groups of about 8,192 tokens, "
        "2,048 on a CPU.",
    )
    truncation: Literal["terminal", "bootstrap"] = Field(
        default="terminal",
        description="At the end of a completion cut at max_tokens. terminal: its score, as for any other; bootstrap: "
        "the critic's value of going on instead of the score, as it is not finished.",
    )
    mask_truncated: bool = Field(
        default=False,
        description="Leave completions cut at max_tokens out of the losses, their normaliser and the whitening.",
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6), description="Optimizer of the policy."
    )
    evaluation: InLoopEvaluationConfig | None = Field(default=None, description="In-loop evaluation.")
    stop: StopConfig | None = Field(default=None, description="Ends training early; null: it runs all `num_steps`.")
    budget: BudgetConfig | None = Field(default=None, description="Ends training early when it is spent.")
    completions_every: int = Field(default=1, ge=1, description="Steps between completions/step_*.parquet files.")

    @model_validator(mode="after")
    def _options_fit_together(self) -> PPOConfig:
        _check_online(self)
        if self.adaptive_kl is not None:
            if self.beta == 0:
                raise ValueError("adaptive_kl multiplies beta, which is 0: give beta a value above 0 to start from")
            completions = self.prompts_per_step * self.group_size
            if self.adaptive_kl.horizon <= 0.2 * completions:
                raise ValueError(
                    f"adaptive_kl.horizon ({self.adaptive_kl.horizon}) is too short for {completions} completions a "
                    f"step, beta could turn negative: use one above {0.2 * completions:g}"
                )
        if self.truncation == "bootstrap" and self.mask_truncated:
            raise ValueError(
                "truncation 'bootstrap' has no effect with mask_truncated, which leaves the completions it is about "
                "out of both losses; remove one of the two"
            )
        return self


def _check_online(config: GRPOConfig | PPOConfig) -> None:
    """What holds wherever a policy is trained on completions it samples itself."""
    sampling = config.sampling
    if sampling.top_k is not None or (sampling.top_p is not None and sampling.top_p < 1):
        raise ValueError(
            f"sampling.top_k ({sampling.top_k}) and sampling.top_p ({sampling.top_p}) bias the ratio in training; "
            "remove them"
        )
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature 0 draws one completion G times; use a value above 0")
    if config.num_minibatches > config.prompts_per_step:
        raise ValueError(
            f"num_minibatches ({config.num_minibatches}) exceeds prompts_per_step ({config.prompts_per_step})"
        )
    if not any(weight > 0 for weight in config.objective_weights.values()):
        raise ValueError("objective_weights are all 0, nothing to train for: give one above 0")
    _check_stop(config.stop, config.evaluation)
    if config.stop is not None and config.stop.max_kl is not None and config.beta == 0:
        raise ValueError("stop.max_kl needs a reference, which beta 0 does not load: give beta a value above 0")
    completions = config.prompts_per_step * config.group_size
    tokens = config.budget.generated_tokens if config.budget is not None else None
    if tokens is not None and tokens < completions:
        raise ValueError(
            f"budget.generated_tokens {tokens} is too small for one step of up to {completions} completions; raise it, "
            "or lower prompts_per_step or group_size"
        )


def _check_stop(stop: StopConfig | None, evaluation: InLoopEvaluationConfig | None) -> None:
    """A rule on a metric needs what measures it."""
    if stop is None or stop.on is None:
        return
    if evaluation is None:
        raise ValueError(f"stop.on {stop.on!r} needs `evaluation`, which is missing: add it, or remove stop.on")
    if stop.on.startswith("evaluation/judge/") and evaluation.judge is None:
        raise ValueError(f"stop.on {stop.on!r} needs a judge: add evaluation.judge, or stop on evaluation/combined")


def _check_nothing_is_generated(budget: BudgetConfig | None, algorithm: str) -> None:
    if budget is not None and budget.generated_tokens is not None:
        raise ValueError(
            f"budget.generated_tokens: {algorithm} samples nothing in training, it would never be spent; "
            "use flops or seconds"
        )


class DPOConfig(Recipe):
    """Direct preference optimisation on pairs of responses."""

    algorithm: Literal["dpo"] = "dpo"
    policy: ModelConfig = Field(description="The model to align; what it is at the start is the reference.")
    data: DataSources = Field(description="Preference pairs: prompt, chosen and rejected.")
    validation_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the pairs, by prompt, held out for validation; 0: none."
    )
    max_length: int = Field(
        default=1024,
        ge=2,
        description="Longest prompt plus response in tokens; prompts are cut from the left, for both sides alike.",
    )
    beta: float = Field(
        default=0.1, gt=0, description="How strongly the policy is held to the reference; tau of IPO, per token."
    )
    kind: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid", description="sigmoid: DPO, on summed log-probabilities; ipo: on means over tokens."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong (conservative DPO); sigmoid only."
    )
    sft_coefficient: float = Field(
        default=0.0, ge=0, description="Weight of the chosen response's mean token loss, added to the loss (RPO)."
    )
    num_epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    batch_size: int = Field(default=16, ge=1, description="Pairs per optimizer step, over all processes.")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="Pairs (two responses each) per forward pass; changes memory, not the result."
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-6), description="Optimizer."
    )
    evaluate_every: int = Field(default=100, ge=1, description="Steps between validations on held-out pairs.")
    evaluation: InLoopEvaluationConfig | None = Field(
        default=None, description="In-loop evaluation: held-out prompts, sampled and scored by `scorers`."
    )
    scorers: Scorers = Field(
        default_factory=list, description="Where the scores of `evaluation` come from; training uses none."
    )
    objective_weights: dict[str, Weight] | None = Field(
        default=None, description="Weights of `evaluation`'s combined score, by aspect; null: all the same."
    )
    stop: StopConfig | None = Field(default=None, description="Ends training early; null: it runs all epochs.")
    budget: BudgetConfig | None = Field(default=None, description="Ends training early when it is spent.")

    @model_validator(mode="after")
    def _options_fit_together(self) -> DPOConfig:
        if self.kind == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing ({self.label_smoothing}) applies to kind sigmoid only; remove it")
        if self.evaluation is not None and not self.scorers:
            raise ValueError("evaluation needs `scorers` to score what is sampled; add one, or remove `evaluation`")
        if self.evaluation is None and (self.scorers or self.objective_weights is not None):
            raise ValueError(
                "scorers and objective_weights are for `evaluation` only, which is missing: DPO trains on pairs; "
                "add it, or remove them"
            )
        if self.stop is not None and self.stop.max_kl is not None:
            raise ValueError("stop.max_kl: DPO samples nothing, so there is no `kl`: remove it, and use stop.on")
        if self.stop is not None and self.stop.max_uncertainty is not None:
            raise ValueError("stop.max_uncertainty: DPO scores nothing in training: remove it, and use stop.on")
        _check_stop(self.stop, self.evaluation)
        _check_nothing_is_generated(self.budget, "dpo")
        return self


AnyRecipe = SFTConfig | RewardConfig | GRPOConfig | PPOConfig | DPOConfig
RECIPES: dict[str, type[SFTConfig] | type[RewardConfig] | type[GRPOConfig] | type[PPOConfig] | type[DPOConfig]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "grpo": GRPOConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
}
