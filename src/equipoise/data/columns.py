"""From the file's column names to Equipoise's fields, and from flat columns to nested scores and messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from equipoise.data.problems import shown, suggestion
from equipoise.errors import ConfigError

Columns = Mapping[str, str | Mapping[str, str]]

MAPPABLE = ("prompt", "response", "scores", "chosen", "rejected", "kind", "category", "source", "split")
_OPTIONAL_TEXTS = ("kind", "category", "source", "split")
_MAY_BE_MESSAGES = ("prompt", "chosen", "rejected")
_FLAT_SCORE = re.compile(r"scores?[./](.+)", re.DOTALL)
_MESSAGES_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|content)"')


def check_columns(columns: Columns) -> None:
    """Raises ConfigError where `columns` maps a field that Equipoise does not read."""
    for field, column in columns.items():
        if field not in MAPPABLE:
            raise ConfigError(
                f"columns: unknown field {field!r}{suggestion(field, MAPPABLE)}; it maps Equipoise's names "
                f"({', '.join(MAPPABLE)}) to the file's"
            )
        if isinstance(column, Mapping) and field != "scores":
            raise ConfigError(f"columns: {field!r} needs one column name, found {shown(dict(column))}")


def mapped_columns(columns: Columns) -> list[str]:
    """Every column of the file that `columns` names."""
    names: list[str] = []
    for column in columns.values():
        names += column.values() if isinstance(column, Mapping) else [column]
    return names


def nested_names(scores: object) -> set[str]:
    """The aspects of nested scores: `columns` may rename those as well."""
    return set(scores) if isinstance(scores, dict) else set()


def parse_json(text: str) -> Any:
    """JSON in which no key stands twice: which of the two values is meant nobody can tell. Raises ValueError."""
    return json.loads(text, object_pairs_hook=_without_repeated_keys)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice; keep one")
    return fields


def renamed(raw: dict[str, Any], columns: Columns, file_format: str | None) -> dict[str, Any]:
    """The row under Equipoise's names, with flat score columns collected into `scores`.

    `file_format` is the suffix: CSV knows neither numbers nor null, and CSV and Parquet may hold messages as JSON text.
    Raises ValueError where such a text is broken.
    """
    used = set(mapped_columns(columns))
    fields = {name: value for name, value in raw.items() if name not in used and not _FLAT_SCORE.fullmatch(str(name))}
    for field, column in columns.items():
        if not isinstance(column, Mapping) and column in raw:
            fields[field] = raw[column]
    scores = _collected_scores(raw, fields.get("scores"), columns.get("scores"), file_format)
    if scores is not None:
        fields["scores"] = scores
    if file_format in (".csv", ".parquet"):
        for name in _MAY_BE_MESSAGES:
            if isinstance(fields.get(name), str) and _MESSAGES_AS_TEXT.match(fields[name]):
                fields[name] = _parsed_cell(name, fields[name])
    return _typed(fields) if file_format == ".csv" else fields


def _parsed_cell(field: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"`{field}` looks like JSON and is broken: {error}; found {shown(text)}") from error


def _collected_scores(
    raw: dict[str, Any], nested: Any, mapping: str | Mapping[str, str] | None, file_format: str | None
) -> Any:
    if file_format in (".csv", ".parquet") and isinstance(nested, str) and nested.lstrip().startswith("{"):
        nested = _parsed_cell("scores", nested)
    if isinstance(nested, list) and nested and all(isinstance(pair, tuple) and len(pair) == 2 for pair in nested):
        nested = dict(nested)  # Parquet's map type
    mapping = mapping if isinstance(mapping, Mapping) else {}
    flat = {match[1]: value for name, value in raw.items() if (match := _FLAT_SCORE.fullmatch(str(name)))}
    if (not mapping and not flat) or not (nested is None or nested == "" or isinstance(nested, dict)):
        return nested
    nested = nested or {}
    moved = set(mapping.values())
    scores = {
        aspect: value
        for aspect, value in {**nested, **flat}.items()
        if aspect not in moved and not {f"{prefix}{aspect}" for prefix in _FLAT_PREFIXES} & moved
    }
    for aspect, column in mapping.items():
        if column in raw or column in nested:
            scores[aspect] = raw[column] if column in raw else nested[column]
    return scores


_FLAT_PREFIXES = ("scores.", "scores/", "score.", "score/")


def _typed(fields: dict[str, Any]) -> dict[str, Any]:
    """CSV's texts as values: an empty cell is a missing score or label, but the empty text of a prompt."""
    for name in _OPTIONAL_TEXTS:
        if name in fields and not fields[name].strip():
            del fields[name]
    if isinstance(fields.get("scores"), dict):
        fields["scores"] = {aspect: _number(cell) for aspect, cell in fields["scores"].items()}
    return fields


def _number(cell: Any) -> Any:
    """The number in a cell, None where it is empty; what is no number stays as it is, to be reported."""
    if not isinstance(cell, str):
        return cell
    if not cell.strip():
        return None
    try:
        return float(cell)
    except ValueError:
        return cell
