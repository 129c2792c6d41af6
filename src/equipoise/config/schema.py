"""The parts that recipes share. Every key is documented here, once; `docs/recipes.md` is printed from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Schema(BaseModel):
    """A frozen mapping in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _path_as_mapping(value: Any) -> Any:
    """`data: file.jsonl` is short for `data: {path: file.jsonl}`."""
    return {"path": value} if isinstance(value, str) else value


def _always_a_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class DataConfig(Schema):
    """A file, a `datasets` directory or a hub name, and how to read it."""

    path: str = Field(description="JSONL(.gz), CSV or Parquet file, `datasets` directory, or hub dataset name.")
    columns: dict[str, str | dict[str, str]] = Field(
        default_factory=dict,
        description="Maps a field Equipoise reads to the column that holds it: `{prompt: question}`; "
        "scores from flat columns: `{scores: {politeness: polite_score}}`.",
    )
    limit: int | None = Field(default=None, ge=1, description="Use at most this many rows, the first ones.")
    aspect_prefix: str = Field(
        default="",
        description="Put before every aspect name of this set, so that joined sets stay apart: `toxigen/`.",
    )


DataSource = Annotated[DataConfig, BeforeValidator(_path_as_mapping)]
DataSources = Annotated[list[DataSource], BeforeValidator(_always_a_list), Field(min_length=1)]


class AspectConfig(Schema):
    """What one score means: which way is better, and on which scale."""

    higher_is_better: bool = Field(description="The direction; there is no default, a guess would train the opposite.")
    range: tuple[float, float] | None = Field(
        default=None,
        description="Lowest and highest native score. With it the utility is (score - worst)/(best - worst); "
        "without it, the sign times the standardised score.",
    )

    @model_validator(mode="after")
    def _range_ascends(self) -> AspectConfig:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range must be [lowest, highest], got {list(self.range)}")
        return self


Precision = Literal["auto", "float32", "bfloat16"]


class LoraConfig(Schema):
    """Low-rank adapters (peft). Without this block every parameter is trained."""

    r: int = Field(default=16, ge=1, description="Rank.")
    alpha: float = Field(default=32, gt=0, description="Scale; the update is alpha/r times B A.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="Module names or suffixes, or `all-linear`: every linear layer but the head.",
    )


class ModelConfig(Schema):
    """A causal language model from the ecosystem."""

    model: str = Field(description="Hub name or directory; a PEFT adapter directory continues that adapter.")
    revision: str | None = Field(default=None, description="Hub revision (branch, tag or commit).")
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the model. Off: think twice.")
    initialise: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="`random` builds the architecture in config.json with seeded random weights.",
    )
    lora: LoraConfig | None = Field(default=None, description="Train adapters instead of every parameter.")
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of the forward pass and storage of frozen weights; trainable parameters and "
        "log-softmax stay float32. auto: float32 below 100M parameters, else bfloat16.",
    )
    gradient_checkpointing: bool = Field(default=False, description="Trade a second forward pass for memory.")
    prompt_format: Literal["auto", "chat", "text"] = Field(
        default="auto",
        description="How a text prompt becomes tokens. chat: one user message through the chat template; text: as it "
        "is; auto: chat where the tokenizer has a template. Message prompts always need the template.",
    )


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Schema):
    """AdamW with clipping and a schedule."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="Adam's decay rates, at least 0, below 1.")
    eps: float = Field(default=1e-8, gt=0, description="Adam's denominator offset.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled decay, on matrices only.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are scaled down to this norm.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="After the warm-up: stay, or fall to zero, which the step after the last would have.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps of linear rise from zero.")


class SamplingConfig(Schema):
    """How completions are drawn."""

    temperature: float = Field(default=1.0, ge=0, description="Divides the logits; 0 is greedy (evaluation only).")
    max_tokens: int = Field(default=128, ge=1, description="Longest completion in tokens, EOS included.")
    top_k: int | None = Field(default=None, ge=1, description="Evaluation only: training refuses it (biased ratio).")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Evaluation only: training refuses it (biased ratio)."
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Strings that end a completion as an EOS does. The text ends before the first of them; the tokens "
        "that make it up stay in the completion and are trained on.",
    )


class CheckpointConfig(Schema):
    """When to save a state from which the run resumes exactly."""

    every: int = Field(default=50, ge=1, description="Steps between checkpoints; one is always saved at the end.")
    keep: int = Field(default=2, ge=1, description="How many of the newest are kept.")


class ScorerConfig(Schema):
    """One source of scores: a saved reward model, a Python function, or one known by name."""

    name: str | None = Field(default=None, description="`sandbox`: the rubric of the embedded sandbox.")
    reward_model: str | None = Field(default=None, description="Directory of a reward model saved by Equipoise.")
    reward_models: list[str] | None = Field(
        default=None,
        min_length=2,
        description="Directories of reward models with the same aspects: an ensemble, each one a member.",
    )
    function: str | None = Field(
        default=None,
        description="`package.module:function`, called as function(prompts, completions) -> {aspect: values}; "
        "None in values means not scored.",
    )
    aspects: dict[str, AspectConfig] = Field(
        default_factory=dict, description="What a function's scores mean; a reward model carries its own."
    )
    batch_size: int = Field(default=32, ge=1, description="Responses a reward model scores at once.")

    @model_validator(mode="after")
    def _one_source(self) -> ScorerConfig:
        sources = (self.name, self.reward_model, self.reward_models, self.function)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("give exactly one of `reward_model`, `reward_models`, `function` and `name`")
        if self.function is not None and not self.aspects:
            raise ValueError("a function scorer declares its `aspects` with `higher_is_better`")
        if self.function is not None and ":" not in self.function:
            raise ValueError(f"`function` is `package.module:function`, got {self.function!r}")
        if self.function is None and self.aspects:
            raise ValueError("a reward model or named scorer carries its own aspects; remove `aspects`")
        return self


def _name_as_mapping(value: Any) -> Any:
    """`scorers: sandbox` is short for `scorers: [{name: sandbox}]`."""
    return {"name": value} if isinstance(value, str) else value


NamedScorer = Annotated[ScorerConfig, BeforeValidator(_name_as_mapping)]
Scorers = Annotated[list[NamedScorer], BeforeValidator(_always_a_list)]
Weight = Annotated[float, Field(ge=0)]


class InLoopEvaluationConfig(Schema):
    """Held-out prompts sampled and scored while training goes on."""

    every: int = Field(ge=1, description="Steps between evaluations; the last step is always evaluated.")
    prompts: DataSources = Field(description="Held-out prompts.")
    samples: int = Field(default=1, ge=1, description="Completions per prompt.")
    sampling: SamplingConfig | None = Field(default=None, description="How they are drawn; null: as in training.")
    judge: str | None = Field(
        default=None,
        description="A second opinion that training never uses: reward model directory, `package.module:function` or "
        "`sandbox`; logged as `evaluation/judge/*`.",
    )


COMBINED_METRICS = ("evaluation/combined", "evaluation/judge/combined")  # whose direction is known


class StopConfig(Schema):
    """When training ends before its last step, against over-optimisation, and which parameters are saved then."""

    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="End after the step at which the mean of `kl` over the last 5 steps exceeds this (nats per "
        "completion); never before 5 steps, so that one noisy step does not decide. Not for DPO.",
    )
    max_uncertainty: float | None = Field(
        default=None,
        gt=0,
        description="End after the step at which `uncertainty/<aspect>/ratio` of some aspect exceeds this: the members "
        "of a reward ensemble disagree that many times as much as in the first 5 steps. Not for DPO.",
    )
    on: str | None = Field(
        default=None,
        description="End when this metric of the in-loop evaluation no longer improves: `evaluation/judge/combined`, "
        "`evaluation/combined` or another `evaluation/*`.",
    )
    higher_is_better: bool | None = Field(
        default=None,
        description="Direction of `on`: required, a guess would keep the worst; combined scores know theirs, true.",
    )
    patience: int = Field(default=3, ge=1, description="Evaluations in a row without an improvement of `on`.")
    min_delta: float = Field(
        default=0.0,
        ge=0,
        description="How much better than the last improvement (the first evaluation is one) an evaluation must be to "
        "count as one, in units of `on`; 0: any amount.",
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="Parameters saved as the model, also where nothing ended training early: those of the last step, "
        "or of the evaluation with the best `on`.",
    )

    @model_validator(mode="after")
    def _rules_are_whole(self) -> StopConfig:
        if self.max_kl is None and self.max_uncertainty is None and self.on is None:
            raise ValueError("stop has no rule: give max_kl, max_uncertainty, on, or several")
        if self.on is None:
            if self.keep == "best" or self.higher_is_better is not None:
                raise ValueError("keep best and higher_is_better are about `on`, which is missing: give it a metric")
            return self
        if not self.on.startswith("evaluation/"):
            raise ValueError(
                f"on {self.on!r} is not a metric of the in-loop evaluation: give one that starts with evaluation/, "
                "as evaluation/judge/combined does"
            )
        combined = self.on in COMBINED_METRICS
        if not combined and self.higher_is_better is None:
            raise ValueError(f"say whether more of {self.on!r} is better: add higher_is_better: true or false")
        if combined and self.higher_is_better is False:
            raise ValueError(f"{self.on!r} is a sum of utilities, of which more is better: remove higher_is_better")
        return self


class BudgetConfig(Schema):
    """What a run may spend; training ends after the step at which the first of these is reached."""

    generated_tokens: int | None = Field(default=None, ge=1, description="Completion tokens sampled in training.")
    flops: float | None = Field(default=None, gt=0, description="Sum of the FLOPs in cost.json, of every kind.")
    seconds: float | None = Field(
        default=None,
        gt=0,
        description="Seconds of the clock, loading and evaluations included; a resumed run goes on from what its "
        "checkpoint had spent. The one budget that does not end at the same step twice.",
    )

    @model_validator(mode="after")
    def _limits_something(self) -> BudgetConfig:
        if self.generated_tokens is None and self.flops is None and self.seconds is None:
            raise ValueError("budget limits nothing: give generated_tokens, flops or seconds")
        return self


class Recipe(Schema):
    """What every recipe has."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="Seeds initialisation, order of data and sampling.")
    out: str | None = Field(default=None, description="Run directory; `--out` overrides it.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: the cores of the machine.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="When to save.")
