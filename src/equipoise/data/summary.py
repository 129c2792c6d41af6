"""What `equipoise validate DATA` shows: the kind of data, found from its fields, and what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.data.checks import demonstration_record, pair_record, prompt_record, scored_record
from equipoise.data.columns import Columns
from equipoise.data.loading import records_from_rows
from equipoise.data.problems import Problems
from equipoise.data.reading import Row, read_rows
from equipoise.data.records import SPLITS, PromptRecord, Record, ScoredRecord
from equipoise.data.splits import CrossSplitDuplicate, cross_split_duplicates, prompt_text, response_text
from equipoise.errors import DataError

_BUILDERS: dict[str, tuple[tuple[str, ...], Callable[[Row, Problems], Any]]] = {
    "scored": (("scores",), scored_record),
    "pairs": (("chosen", "rejected"), pair_record),
    "demonstrations": (("response",), demonstration_record),
    "prompts": (("prompt",), prompt_record),
}


@dataclass(frozen=True, slots=True)
class AspectSummary:
    """Scores of one aspect: `count` scored rows, the share of rows without a score, and the native scale found."""

    count: int
    missing_share: float
    minimum: float | None
    maximum: float | None
    mean: float | None


@dataclass(frozen=True, slots=True)
class DataSummary:
    """The contents of valid data. `kinds` counts rows by prompt kind (scored rows carry none)."""

    source: str
    record_kind: str
    rows: int
    distinct_prompts: int
    empty_prompts: int
    empty_responses: int
    repeated_rows: int
    kinds: dict[str, int]
    splits: dict[str, int]
    aspects: dict[str, AspectSummary]
    duplicates: list[CrossSplitDuplicate]

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.record_kind}, {self.rows} rows, {self.distinct_prompts} distinct prompts"]
        if self.kinds:
            lines.append("kinds: " + ", ".join(f"{kind} {count}" for kind, count in self.kinds.items()))
        if self.splits:
            lines.append("splits: " + ", ".join(f"{split} {count}" for split, count in self.splits.items()))
        for name, aspect in self.aspects.items():
            numbers = f"n {aspect.count}, missing {aspect.missing_share:.1%}"
            if aspect.count:
                numbers += f", {aspect.minimum:g} to {aspect.maximum:g}, mean {aspect.mean:.4g}"
            lines.append(f"aspect {name}: {numbers}")
        for count, what in (
            (self.empty_prompts, "rows with the empty prompt"),
            (self.empty_responses, "rows with an empty response"),
            (self.repeated_rows, "rows that repeat an earlier row"),
        ):
            if count:
                lines.append(f"note: {count} {what}")
        if self.duplicates:
            lines.append(f"warning: {len(self.duplicates)} prompts or rows stand in more than one split, the first:")
            lines += [f"  {duplicate}" for duplicate in self.duplicates[:5]]
        return "\n".join(lines)


def validate_data(path: str | Path, columns: Columns | None = None) -> DataSummary:
    """Check every row of a data file, directory or hub data set, and say what is in it.

    The kind is found from the fields that most rows have: `scores`, else `chosen` and `rejected`, else `response`, else
    `prompt`. Raises DataError naming every bad row, or where no kind fits.
    """
    problems = Problems()
    rows = list(read_rows(path, columns=columns, problems=problems))
    kind = _kind_of(rows, path) if rows else "prompts"
    records: list[Record] = list(records_from_rows(rows, _BUILDERS[kind][1], problems))
    problems.raise_if_any()
    return _summarise(str(path), kind, records)


def _kind_of(rows: Sequence[Row], path: str | Path) -> str:
    counts = Counter(name for row in rows for name, value in row.fields.items() if value is not None)
    for kind, (needed, _) in _BUILDERS.items():
        if all(counts[name] * 2 > len(rows) for name in needed):
            return kind
    names = ", ".join(str(name) for name, _ in counts.most_common(20))
    raise DataError(
        f"{path}: neither prompts, scored responses, pairs nor demonstrations: no `prompt` among the columns {names}; "
        "map them with `columns: {prompt: <its name>}`"
    )


def _summarise(source: str, kind: str, records: list[Record]) -> DataSummary:
    scored = [record for record in records if isinstance(record, ScoredRecord)]
    splits = {name: [record for record in records if record.split == name] for name in SPLITS}
    prompts = [prompt_text(record.prompt) for record in records]
    rows = {(prompt, response_text(record)) for prompt, record in zip(prompts, records, strict=True)}
    responses = [] if kind == "prompts" else [_has_empty_response(record) for record in records]
    kinds = Counter(getattr(record, "kind", None) for record in records)
    return DataSummary(
        source=source,
        record_kind=kind,
        rows=len(records),
        distinct_prompts=len(set(prompts)),
        empty_prompts=prompts.count(""),
        empty_responses=sum(responses),
        repeated_rows=len(records) - len(rows),
        kinds={name: count for name, count in sorted(kinds.items(), key=str) if name is not None},
        splits={name: len(members) for name, members in splits.items() if members},
        aspects=_aspects(scored),
        duplicates=cross_split_duplicates(splits),
    )


def _has_empty_response(record: Record) -> bool:
    if isinstance(record, PromptRecord):
        return False
    texts = [getattr(record, name, None) for name in ("response", "chosen", "rejected")]
    return "" in texts


def _aspects(records: list[ScoredRecord]) -> dict[str, AspectSummary]:
    result: dict[str, AspectSummary] = {}
    for aspect in dict.fromkeys(name for record in records for name in record.scores):
        values = [value for record in records if (value := record.scores.get(aspect)) is not None]
        result[aspect] = AspectSummary(
            count=len(values),
            missing_share=1 - len(values) / len(records),
            minimum=min(values, default=None),
            maximum=max(values, default=None),
            mean=sum(values) / len(values) if values else None,
        )
    return result
