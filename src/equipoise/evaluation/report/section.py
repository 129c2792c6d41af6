"""What a section of the report is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from equipoise.evaluation.report.charts import Chart
from equipoise.evaluation.report.inputs import ReportData


def no_charts(data: ReportData) -> list[Chart]:
    """For sections of text and tables."""
    return []


@dataclass(frozen=True)
class Section:
    """One part of the page.

    `content` gives what templates/<name>.html fills in, or None where the directory holds nothing for it: the section
    is then left out, and `missing` says so under limits. `charts` are also written as figures/<chart name>.png.
    """

    name: str
    title: str
    content: Callable[[ReportData], dict[str, Any] | None]
    missing: str = ""
    charts: Callable[[ReportData], list[Chart]] = no_charts
    short: str = ""  # the title in the navigation, where the long one would crowd it
