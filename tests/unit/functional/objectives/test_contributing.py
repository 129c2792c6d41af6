"""CONTRIBUTING shows how a method is added by the diff of a real one: the diff has to be that of the code as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A new way to combine objectives")[2]


def shown() -> dict[str, list[str]]:
    """Lines that the diff adds, by file."""
    (diff,) = re.findall(r"```diff\n(.*?)```", SECTION, flags=re.DOTALL)
    files: dict[str, list[str]] = {}
    for line in diff.splitlines():
        if line.startswith("+++ b/"):
            lines = files.setdefault(line.removeprefix("+++ b/"), [])
        elif line != "...":
            assert line.startswith("+"), f"neither added nor left out: {line!r}"
            lines.append(line[1:])
    return files


@pytest.mark.parametrize("path", shown())
def test_every_line_is_in_its_file_in_this_order(path: str) -> None:
    rest = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
    missing = [line for line in shown()[path] if line not in rest]
    assert not missing, f"{path} has no such line, or not there: {missing}"


def test_it_is_a_function_a_line_in_the_table_a_test_file_and_a_line_of_documentation() -> None:
    function, table, test, page = shown()
    assert re.fullmatch(r"src/equipoise/functional/objectives/(\w+)\.py", function)
    assert (table, test) == (
        "src/equipoise/functional/objectives/__init__.py",
        f"tests/unit/functional/objectives/test_{Path(function).name}",
    )
    assert page == "docs/algorithms/objectives.md"


def test_every_file_it_names_exists() -> None:
    named = re.findall(r"`((?:src|tests|docs|recipes|tools)/[\w/.]+)`", SECTION)
    assert len(named) >= 3
    for path in named:
        assert (ROOT / path).is_file(), path
