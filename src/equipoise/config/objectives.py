"""How objectives are steered while a policy trains: constraints, schedules of their weights, diagnostics."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from equipoise.config.schema import Schema, Weight


class ConstraintConfig(Schema):
    """A level that the mean of an aspect, or the length, has to keep; its multiplier is learned."""

    min: float | None = Field(default=None, description="Lowest mean allowed, native scale; give this or `max`.")
    max: float | None = Field(default=None, description="Highest mean allowed, native scale; give this or `min`.")
    margin: float = Field(
        default=0.0,
        ge=0,
        description="Training aims at min + margin, or max - margin, so that prompts it never saw keep the level.",
    )
    on: Literal["benign", "borderline", "adversarial", "unlabelled"] | None = Field(
        default=None, description="Prompts of this kind only; null: all."
    )
    ki: float = Field(
        default=0.5, ge=0, description="Step of dual ascent: how much a violation adds to ln(multiplier) for good."
    )
    kp: float = Field(
        default=0.0, ge=0, description="PID: how much a violation adds to ln(multiplier) while it lasts; 0: plain."
    )
    kd: float = Field(
        default=0.0, ge=0, description="PID: how much a violation that grows adds to ln(multiplier); 0: plain."
    )
    average: float = Field(
        default=0.0, ge=0, lt=1, description="Decay of the running mean of the violation; 0: each step's own."
    )
    initial_multiplier: float = Field(default=0.1, gt=0, description="Multiplier of the first step.")
    min_multiplier: float = Field(
        default=1e-3, gt=0, description="It falls no lower, so that it is soon back when the level is lost."
    )
    max_multiplier: float = Field(
        default=100.0, gt=0, description="It rises no higher; there, with the level still missed, a warning is due."
    )

    @model_validator(mode="after")
    def _bounds_something(self) -> ConstraintConfig:
        if (self.min is None) == (self.max is None):
            found = "neither is given" if self.min is None else f"min {self.min:g} and max {self.max:g} are given"
            raise ValueError(f"a constraint has one bound, min or max: {found}")
        if self.ki == 0 and self.kp == 0 and self.kd == 0:
            raise ValueError("ki, kp and kd are all 0, the multiplier would never move: give one above 0")
        if not self.min_multiplier <= self.initial_multiplier <= self.max_multiplier:
            raise ValueError(
                f"initial_multiplier {self.initial_multiplier:g} lies outside min_multiplier "
                f"{self.min_multiplier:g} to max_multiplier {self.max_multiplier:g}"
            )
        return self


class WeightPointConfig(Schema):
    """Weights from a step on."""

    step: int = Field(ge=1, description="Completed steps after which these weights hold.")
    weights: dict[str, Weight] = Field(min_length=1, description="Weight of every aspect.")


class AdaptiveWeightsConfig(Schema):
    """Weights that follow the objectives that lag their targets."""

    targets: dict[str, float] = Field(
        min_length=1, description="Mean to reach by aspect, native scale; an aspect without one never lags."
    )
    rate: float = Field(
        default=0.5, gt=0, description="ln(weight) grows by this, times how far the mean utility is below its target."
    )
    average: float = Field(default=0.9, ge=0, lt=1, description="Decay of the running means; 0: each step's own.")
    anchor: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Share of `objective_weights` mixed in at every step: no weight falls below this share of its "
        "own, and where nothing lags they come back.",
    )


class ScheduleConfig(Schema):
    """Objective weights that change in training, from `objective_weights`, which hold at the first step."""

    piecewise: list[WeightPointConfig] | None = Field(
        default=None, description="Linear between these points, constant after the last."
    )
    adaptive: AdaptiveWeightsConfig | None = Field(
        default=None, description="Raised for what lags its target, their sum kept."
    )

    @model_validator(mode="after")
    def _one_schedule(self) -> ScheduleConfig:
        if (self.piecewise is None) == (self.adaptive is None):
            raise ValueError("a schedule is either piecewise or adaptive; for constant weights leave it out")
        if self.piecewise is not None and not self.piecewise:
            raise ValueError("piecewise needs at least one point: {step, weights}")
        for point, following in pairwise(self.piecewise or []):
            if point.step >= following.step:
                raise ValueError(f"piecewise: step {following.step} does not come after step {point.step}")
        for point in self.piecewise or []:
            if not any(weight > 0 for weight in point.weights.values()):
                raise ValueError(f"piecewise: the weights of step {point.step} are all 0, nothing to train for")
        return self


PLACE = "{weights}"
TEMPLATE = f"Weigh your objectives in this way: {PLACE}."


def check_template(template: str) -> None:
    """Raises ValueError for a message that does not have {weights} exactly once."""
    if template.count(PLACE) != 1:
        raise ValueError(f"template {template!r}: needs {PLACE} once, where the weights stand, as in {TEMPLATE!r}")


class ConditionedConfig(Schema):
    """A policy that reads the weights of its objectives in its prompt, so that they are chosen at inference."""

    corner_share: float = Field(
        default=0.25, ge=0, le=1, description="How often a prompt asks for one objective alone, each as often."
    )
    concentration: float = Field(
        default=1.0,
        gt=0,
        description="Of the Dirichlet distribution of all other weights; 1: uniform, more: nearer to equal weights.",
    )
    template: str = Field(default=TEMPLATE, description="The system message; `{weights}` is where the weights stand.")

    @model_validator(mode="after")
    def _names_the_weights(self) -> ConditionedConfig:
        check_template(self.template)
        return self


class DiagnosticsConfig(Schema):
    """What is measured on demand, for its cost."""

    gradient_conflict_every: int = Field(
        ge=1,
        description="Steps between measurements of the cosines between the objectives' policy gradients: one forward "
        "pass over the rollout more, a backward pass and a copy of the gradient for each objective.",
    )
