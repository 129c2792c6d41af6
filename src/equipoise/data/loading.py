"""Rows checked and turned into records: every bad row is reported with its place, in one error, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from equipoise.config import DataConfig
from equipoise.data.checks import demonstration_record, pair_record, prompt_record, scored_record
from equipoise.data.columns import Columns
from equipoise.data.problems import Problems, suggestion
from equipoise.data.reading import Row, read_rows
from equipoise.data.records import DemonstrationRecord, PairRecord, PromptRecord, ScoredRecord
from equipoise.errors import DataError

Source = str | Path | DataConfig
Sources = Source | Sequence[Source]
R = TypeVar("R")


def load_prompts(source: Sources, *, columns: Columns | None = None, limit: int | None = None) -> list[PromptRecord]:
    """Prompts from one source or several, in order; `limit` takes the first rows of each.

    A source is a path, a hub name or a `DataConfig` (whose own columns and limit come first). Rows need `prompt` only:
    scored rows, pairs and demonstrations can serve as prompts too. Raises DataError naming every bad row.
    """
    return _load(source, prompt_record, columns, limit)


def load_pairs(source: Sources, *, columns: Columns | None = None, limit: int | None = None) -> list[PairRecord]:
    """Preference pairs: `prompt`, `chosen`, `rejected`. Sources and errors as in `load_prompts`.

    `chosen` and `rejected` are texts, lists of one assistant message, or whole conversations. Whole conversations may
    come without `prompt`: it is then what they share before the last reply. Sides that are empty or equal are errors.
    """
    return _load(source, pair_record, columns, limit)


def load_demonstrations(
    source: Sources, *, columns: Columns | None = None, limit: int | None = None
) -> list[DemonstrationRecord]:
    """Demonstrations: `prompt`, `response`. Sources and errors as in `load_prompts`."""
    return _load(source, demonstration_record, columns, limit)


def load_scored(
    source: Sources,
    *,
    aspects: Sequence[str] | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    aspect_prefix: str = "",
) -> list[ScoredRecord]:
    """Scored responses: `prompt`, `response`, `scores`. Sources and errors as in `load_prompts`.

    `aspect_prefix` (or the one of a `DataConfig`) is put before every aspect's name, so that joined sets stay apart.
    With `aspects`, DataError also where one of them has no score in any row. Aspects in the data that `aspects` does
    not name are kept; `undeclared_aspects` tells them.
    """
    records = _load(source, scored_record, columns, limit, aspect_prefix)
    if aspects is not None:
        _check_every_aspect_has_scores(records, aspects, source)
    return records


def undeclared_aspects(records: Iterable[ScoredRecord], aspects: Iterable[str]) -> list[str]:
    """Aspects that rows score and the recipe does not declare, sorted: they are not trained on, say so."""
    return sorted({aspect for record in records for aspect in record.scores} - set(aspects))


def _check_every_aspect_has_scores(records: list[ScoredRecord], aspects: Sequence[str], source: Sources) -> None:
    scored = {aspect for record in records for aspect, value in record.scores.items() if value is not None}
    named = {aspect for record in records for aspect in record.scores}
    lacking = []
    for aspect in aspects:
        if aspect not in named:
            lacking.append(f"aspect {aspect!r} is in no row{suggestion(aspect, named)}")
        elif aspect not in scored:
            lacking.append(f"aspect {aspect!r}: all scores are missing")
    if lacking:
        names = ", ".join(str(_unpacked(one, None, None)[0]) for one in _as_list(source))
        raise DataError(
            f"{names}: {'; '.join(lacking)}. Aspects with scores: {', '.join(sorted(scored)) or 'none'}. "
            f"Add scores or take the aspect out of `aspects`"
        )


_KINDS: dict[Callable[..., Any], str] = {
    prompt_record: "prompts",
    pair_record: "pairs",
    demonstration_record: "demonstrations",
    scored_record: "scored",
}


def _load(
    source: Sources,
    build: Callable[[Row, Problems], R | None],
    columns: Columns | None,
    limit: int | None,
    aspect_prefix: str = "",
) -> list[R]:
    problems = Problems()
    records: list[R] = []
    for one in _as_list(source):
        path, its_columns, its_limit = _unpacked(one, columns, limit)
        prefix = (one.aspect_prefix if isinstance(one, DataConfig) else "") or aspect_prefix
        rows = islice(read_rows(path, columns=its_columns, problems=problems, kind=_KINDS[build]), its_limit)
        records += records_from_rows(rows, build, problems, its_columns, prefix)
    problems.raise_if_any()
    return records


def records_from_rows(
    rows: Iterable[Row],
    build: Callable[[Row, Problems], R | None],
    problems: Problems,
    columns: Columns | None = None,
    aspect_prefix: str = "",
) -> Iterator[R]:
    """Records of the rows that `build` accepts; what it refuses is in `problems`."""
    for row in rows:
        if aspect_prefix and isinstance(row.fields.get("scores"), dict):
            scores = {f"{aspect_prefix}{aspect}": value for aspect, value in row.fields["scores"].items()}
            row = Row(row.location, {**row.fields, "scores": scores})
        record = build(row, problems)
        if record is not None:
            yield record


def _as_list(source: Sources) -> list[Source]:
    if isinstance(source, str | Path | DataConfig):
        return [source]
    if not source:
        raise DataError("no data source given; name at least one file, directory or hub data set")
    return list(source)


def _unpacked(
    source: Source, columns: Columns | None, limit: int | None
) -> tuple[str | Path, Columns | None, int | None]:
    if not isinstance(source, DataConfig):
        return source, columns, limit
    return source.path, source.columns or columns, source.limit if source.limit is not None else limit
