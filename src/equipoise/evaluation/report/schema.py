"""The shapes of the files a report reads. Fields it does not use are ignored; what it uses must be right."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Interval = tuple[Number | None, Number | None]


def _prompt_text(value: Any) -> Any:
    """A list of messages as text, a speaker a line."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in value)
    return value


Prompt = Annotated[str, BeforeValidator(_prompt_text)]


class _Input(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Estimate(_Input):
    """A mean with its 95% interval; None throughout where nothing was scored."""

    mean: Number | None
    ci95: Interval = (None, None)
    n: Count | None = None


class Scores(Estimate):
    """An estimate over all prompts, and by prompt kind."""

    by_kind: dict[str, Estimate] = {}


class Evaluation(_Input):
    """evaluation.json."""

    policy: str
    judge: str
    num_prompts: Count
    num_completions: Count
    aspects: dict[str, Scores]
    combined: Scores
    kl_to_reference: Number | None = None
    kl_ci95: Interval | None = None
    refusal_rate: dict[str, Number | None] = {}
    refusal_ci95: dict[str, Interval] = {}
    completion_length: Number | None = None
    truncated_fraction: Number | None = None
    num_unscored: Count = 0
    weights: dict[str, Number] | None = None
    settings: dict[str, Any] = {}

    def score(self, name: str) -> Scores:
        """Of an aspect, or "combined"."""
        return self.combined if name == "combined" else self.aspects[name]

    def refusal(self, kind: str) -> Estimate:
        """The refusal rate on prompts of a kind."""
        return Estimate(mean=self.refusal_rate.get(kind), ci95=self.refusal_ci95.get(kind, (None, None)))


class PairsCost(_Input):
    """What sampling and scoring preference pairs cost; it is part of the run's cost already."""

    wall_s: Number | None = None
    generated_tokens: Number | None = None


class Cost(_Input):
    """cost.json."""

    wall_s: Number | None = None
    generate_s: Number | None = None
    score_s: Number | None = None
    update_s: Number | None = None
    cpu_s: Number | None = None
    generated_tokens: Number | None = None
    trained_tokens: Number | None = None
    flops: dict[str, Number] = {}
    trainable_parameters: Number | None = None
    peak_rss_mb: Number | None = None
    pairs: PairsCost | None = None


class Stopped(_Input):
    """stopped.json: why a run ended, where something could end it before its last step."""

    step: Count
    rule: str
    value: Number | None = None
    limit: Number | None = None
    best_step: Count | None = None


class SeedPoint(_Input):
    """The means of one training seed."""

    aspects: dict[str, Number | None] = {}
    combined: Number | None = None


class Method(_Input):
    """One method in comparison.json."""

    evaluation: Evaluation
    paired_difference: dict[str, Estimate]
    refusal_difference: dict[str, Estimate] = {}
    paired_by_kind: dict[str, dict[str, Estimate]] = {}
    cost: Cost | None = None
    seeds: list[SeedPoint] = []


class Comparison(_Input):
    """comparison.json."""

    base: Evaluation
    methods: dict[str, Method]


class AspectQuality(_Input):
    """How the reward model agrees with the rubric on one aspect."""

    spearman: Number | None
    spearman_ci95: Interval = (None, None)
    pearson: Number | None = None
    n: Count | None = None
    mean_reward: Number | None = None
    mean_rubric: Number | None = None


class RewardQuality(_Input):
    """evaluation/reward_quality.json."""

    aspects: dict[str, AspectQuality]
    responses_of: list[str] = []
    note: str = ""


class Written(_Input):
    """What one policy wrote to a prompt."""

    completion: str
    rubric: dict[str, Number | None] = {}
    reward: dict[str, Number | None] = {}


class Transcript(_Input):
    """A line of transcripts.jsonl."""

    prompt: Prompt
    kind: str
    policies: dict[str, Written]


class ControlTranscript(_Input):
    """One completion of a control."""

    prompt: Prompt
    kind: str
    completion: str
    rubric: dict[str, Number | None] = {}


class Control(_Input):
    """One control in controls.json."""

    title: str
    what: str
    expectation: str
    evaluation: Evaluation | None = None
    paired_difference: dict[str, Estimate] = {}
    paired_by_kind: dict[str, dict[str, Estimate]] = {}
    transcripts: list[ControlTranscript] = []
    from_this_run: bool | None = None  # None: as the file says


class Controls(_Input):
    """controls.json."""

    made: str
    seed: int | None = None
    from_this_run: bool
    command: str = ""
    controls: dict[str, Control]

    def earlier(self) -> list[str]:
        """Titles of the controls that another run made."""
        return [
            control.title
            for control in self.controls.values()
            if not (self.from_this_run if control.from_this_run is None else control.from_this_run)
        ]


class Quickstart(_Input):
    """quickstart.json."""

    seed: int
    size: str | None = None
    model_parameters: Number | None = None
    stages: dict[str, Number] = {}
    seconds: Number | None = None  # by the clock: stages may have run side by side
    started: str | None = None
    finished: str | None = None
    recipes: dict[str, str] = {}
    data: dict[str, Any] = {}
    machine: str | None = None

    @property
    def total_seconds(self) -> float:
        """By the clock; of older files the sum over stages, which they ran one after the other."""
        return sum(self.stages.values()) if self.seconds is None else self.seconds


class AspectReport(_Input):
    """One aspect in reward_report.json: what it means, and regression metrics by split."""

    higher_is_better: bool | None = None
    range: tuple[Number, Number] | None = None
    train: dict[str, Number | None] = {}
    validation: dict[str, Number | None] = {}
    test: dict[str, Number | None] = {}


class RewardReport(_Input):
    """reward_report.json, written by reward training."""

    model: str | None = None
    rows: dict[str, Count] = {}
    aspects: dict[str, AspectReport] = {}
    no_better_than_mean: list[str] = []


class AspectMeaning(_Input):
    """What a recipe declares about an aspect."""

    higher_is_better: bool | None = None
    range: tuple[Number, Number] | None = None
