"""docs/results/comparison.md: sizes that were run apart stay on the page."""

from __future__ import annotations

from pathlib import Path

from benchmarks.comparison import BY_HAND, sections_of, write_page


def test_sections_of_sizes_are_found_and_remarks_are_none(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert sections_of(page) == {}
    write_page(page, ["# Title", "", "Text.", "", "## 1m", "", "| a |", "- b", "", "## 4m", "", "| c |"])
    page.write_text(page.read_text() + "\n## What it says\n\nremark\n")
    assert sections_of(page) == {"1m": ["", "| a |", "- b"], "4m": ["", "| c |"]}
    write_page(page, ["# Title", "", "## 4m", *sections_of(page)["4m"]])
    assert page.read_text() == f"# Title\n\n## 4m\n\n| c |\n\n{BY_HAND}\n\n## What it says\n\nremark\n"
