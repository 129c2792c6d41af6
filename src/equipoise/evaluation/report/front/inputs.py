"""pareto.json as the report reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from equipoise.errors import DataError
from equipoise.evaluation.report.inputs import optional
from equipoise.evaluation.report.schema import Estimate, Interval, Number
from equipoise.evaluation.report.text import visible_line

FRONT_FILE = "pareto.json"
BASE, TRAINED, SOUP, CONDITIONED = "base", "trained", "soup", "conditioned"
DONE = "done"


class _Input(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Entry(_Input):
    """The base, a trained point, a soup, or a conditioned policy asked for some weights."""

    name: str
    weights: dict[str, Number] = {}
    status: str
    seconds: Number = 0.0
    reason: str | None = None
    scores: dict[str, Estimate] | None = None
    utilities: dict[str, Estimate] | None = None
    kl: Number | None = None
    dominated: bool | None = None

    @property
    def kind(self) -> str:
        """base, trained, soup or conditioned."""
        return {"points": TRAINED, "soups": SOUP, CONDITIONED: CONDITIONED}.get(self.name.partition("/")[0], BASE)

    @property
    def label(self) -> str:
        """For people: base, point 3, soup 0."""
        kind, _, number = self.name.partition("/")
        return f"{kind.removesuffix('s')} {int(number)}" if number.isdigit() else visible_line(self.name)

    def value(self, objective: str) -> float:
        """The mean utility, of an entry that was judged."""
        assert self.utilities is not None
        mean = self.utilities[objective].mean
        assert mean is not None  # an entry with an aspect that nothing scored has no utilities
        return mean


class Volume(_Input):
    """A hypervolume, or a difference of two."""

    value: Number
    ci95: Interval

    @property
    def estimate(self) -> Estimate:
        """As other numbers are written."""
        return Estimate(mean=self.value, ci95=self.ci95)


class Followed(_Input):
    """How the weight of an objective and its utility go together over some entries."""

    rank_correlation: Number | None = None
    ci95: Interval
    n: int

    @property
    def estimate(self) -> Estimate:
        """As other numbers are written."""
        return Estimate(mean=self.rank_correlation, ci95=self.ci95)


class AspectOf(_Input):
    """What an aspect's numbers mean."""

    higher_is_better: bool
    range: tuple[Number, Number] | None = None


class Front(_Input):
    """pareto.json."""

    objectives: list[str]
    aspects: dict[str, AspectOf]
    base: Entry
    points: list[Entry]
    soups: list[Entry] = []
    conditioned: list[Entry] = []
    followed: dict[str, dict[str, Followed]] | None = None
    reference: dict[str, Number] | None = None
    hypervolume: dict[str, Volume] | None = None
    knee: str | None = None
    settings: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    notes: list[str] = []
    machine: str | None = None
    started: str | None = None
    finished: str | None = None

    @model_validator(mode="after")
    def _every_point_has_the_objectives(self) -> Front:
        for entry in (self.base, *self.points, *self.soups, *self.conditioned):
            if entry.utilities is None:
                continue
            for objective in self.objectives:
                if entry.utilities.get(objective, Estimate(mean=None)).mean is None:
                    raise ValueError(f"{entry.name} has no utility of {objective!r}")
        return self


@dataclass(frozen=True)
class FrontData:
    """A sweep's directory, read."""

    directory: Path
    front: Front

    @property
    def entries(self) -> list[Entry]:
        """Base, points, soups and what a conditioned policy was asked for."""
        return [self.front.base, *self.front.points, *self.front.soups, *self.front.conditioned]

    def judged(self, *kinds: str) -> list[Entry]:
        """Those with scores, of these kinds (all, if none is named)."""
        return [e for e in self.entries if e.utilities is not None and (not kinds or e.kind in kinds)]

    @property
    def knee(self) -> Entry | None:
        """The knee point."""
        return next((entry for entry in self.front.points if entry.name == self.front.knee), None)


def is_front(directory: Path) -> bool:
    """True for a directory that `equipoise pareto` wrote to."""
    return (directory / FRONT_FILE).is_file()


def read_front(directory: Path) -> FrontData:
    """Raises DataError where pareto.json is broken, naming the field."""
    front = optional(directory / FRONT_FILE, Front)
    if front is None:
        raise DataError(f"{directory}: holds no {FRONT_FILE}; give the directory of a sweep")
    return FrontData(directory, front)
