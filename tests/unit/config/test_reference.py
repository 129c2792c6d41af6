"""docs/recipes.md is printed from the schemas, and complete."""

from __future__ import annotations

from pathlib import Path

from equipoise.config import RECIPES
from equipoise.config.reference import reference

PAGE = Path(__file__).resolve().parents[3] / "docs" / "recipes.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m equipoise.config.reference"


def test_every_key_of_every_recipe_has_a_row() -> None:
    page = reference()
    for name, schema in RECIPES.items():
        section = page.partition(f"## algorithm: {name}\n")[2].partition("\n## ")[0]
        for key in schema.model_fields:
            assert f"| `{key}` |" in section


def test_rows_say_type_default_and_limits() -> None:
    page = reference()
    assert "| `group_size` | integer | `8` |" in page
    assert "| `num_steps` | integer | required |" in page
    assert "| `evaluation` | [InLoopEvaluation](#inloopevaluation) or null | `null` |" in page
    assert "(above 0, below 1)" in page.partition("`epsilon`")[2].splitlines()[0]
    assert "## InLoopEvaluation" in page and "## Lora" in page  # blocks within blocks
