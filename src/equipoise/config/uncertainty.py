"""Reward models that know how far to trust them: ensembles, and policies that train on a cautious reading of them."""

from __future__ import annotations

from pydantic import Field, model_validator

from equipoise.config.schema import Schema


class EnsembleConfig(Schema):
    """Several sets of output heads on one backbone, trained together; what they disagree on is not well known."""

    members: int = Field(ge=2, description="Sets of heads, each with its own initialisation.")
    bootstrap: bool = Field(
        default=True,
        description="Every member weighs the training rows its own way (Bayesian bootstrap); off: they differ by "
        "their initialisation alone.",
    )


class PessimismConfig(Schema):
    """Training on the mean of an ensemble less what its members disagree by."""

    kappa: float | dict[str, float] = Field(
        description="Standard deviations of the members taken off each aspect's utility; one number, or one by aspect "
        "(an aspect that is not named: 0)."
    )

    @model_validator(mode="after")
    def _is_not_optimism(self) -> PessimismConfig:
        named = self.kappa.items() if isinstance(self.kappa, dict) else [("", self.kappa)]
        for name, value in named:
            if value < 0:
                where = f"kappa.{name}" if name else "kappa"
                raise ValueError(
                    f"{where} {value:g} is negative, it would reward what the members disagree on; use 0 or more"
                )
        return self
