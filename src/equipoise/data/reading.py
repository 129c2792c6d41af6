"""Rows out of JSONL(.gz), CSV, Parquet, `datasets` directories and hub names, each with the place it stands at.

Nothing here judges what a row means; `loading` does. No format executes code from the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.data.builtin import builtin_rows, is_builtin
from equipoise.data.columns import Columns, check_columns, mapped_columns, nested_names, parse_json, renamed
from equipoise.data.problems import Problems, shown, suggestion
from equipoise.data.records import SPLITS
from equipoise.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".json")
FORMATS = (*JSON_LINES, ".csv", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LARGEST_CSV_CELL = 2**31 - 1
MOST_NAMES_SHOWN = 50


class Location(NamedTuple):
    """Where a row stands: file and line for text formats, file (or data set) and row, from 1, for the others."""

    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


class Row(NamedTuple):
    """One row as it stands in the file, under Equipoise's names where `columns` renames it."""

    location: Location
    fields: dict[str, Any]


def read_rows(
    path_or_name: str | Path,
    *,
    columns: Columns | None = None,
    problems: Problems | None = None,
    kind: str = "scored",
) -> Iterator[Row]:
    """Yields every row of a file, a directory, a hub data set or a built-in one.

    `kind` (prompts, scored, demonstrations, pairs) says what is wanted of a built-in set, which holds all of them.

    `columns` maps Equipoise's field to the file's column; `{"scores": {aspect: column}}` collects (or renames) scores.
    Columns named `scores.<aspect>` or `score/<aspect>` are collected without it. `name#split` reads one split of a
    `datasets` directory or hub data set. A row that cannot be parsed goes to `problems` and reading goes on; without
    `problems` the first one raises.

    Raises DataError (missing file, unknown format, no rows, unreadable file or row, a mapped column that no row has)
    and ConfigError (a field in `columns` that Equipoise does not read).
    """
    columns = columns or {}
    check_columns(columns)
    found: dict[str, None] = {}
    missing = dict.fromkeys(mapped_columns(columns))
    collected = Problems() if problems is None else problems
    rows = 0
    for location, raw in _rows_of(path_or_name, collected, kind):
        rows += 1
        for key in missing.keys() & (raw.keys() | nested_names(raw.get("scores"))):
            del missing[key]
        if missing and len(found) < MOST_NAMES_SHOWN:
            found.update(dict.fromkeys(raw))
        try:
            fields = renamed(raw, columns, _format_of(Path(location.source)))
        except ValueError as error:
            collected.add(location, str(error))
        else:
            yield Row(location, fields)
        if problems is None:
            collected.raise_if_any()
    if problems is None:
        collected.raise_if_any()
    if not rows and not collected.count:
        raise DataError(f"{path_or_name}: holds no rows; give a file with at least one")
    if missing and rows:
        name = next(iter(missing))
        raise DataError(
            f"{path_or_name}: `columns` names {name!r}, which no row has{suggestion(name, found)}; "
            f"columns found: {', '.join(map(str, found))}"
        )


def _rows_of(path_or_name: str | Path, problems: Problems, kind: str) -> Iterator[tuple[Location, dict[str, Any]]]:
    path = Path(path_or_name).expanduser()
    name, _, split = str(path_or_name).partition("#")
    if is_builtin(str(path_or_name)):
        for number, row in enumerate(builtin_rows(str(path_or_name), kind), start=1):
            yield Location(str(path_or_name), number), row
    elif path.is_file():
        yield from _file_rows(path, problems)
    elif path.is_dir() or (split and Path(name).expanduser().is_dir()):
        yield from _directory_rows(path if path.is_dir() else Path(name).expanduser(), split, problems)
    elif _looks_like_a_file(name) or not _HUB_NAME.fullmatch(name):
        raise DataError(f"{path_or_name}: no such file or directory{_neighbour(path)}")
    else:
        yield from _hub_rows(name, split, _neighbour(path) if path.parent.is_dir() else "")


def _looks_like_a_file(name: str) -> bool:
    return name.removesuffix(".gz").endswith(FORMATS) or name.startswith((".", "/", "~"))


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (the directory {path.parent} does not exist either)"
    return suggestion(path.name, sorted(entry.name for entry in path.parent.iterdir()))


def _format_of(path: Path) -> str | None:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in FORMATS else None


def _file_rows(path: Path, problems: Problems) -> Iterator[Row]:
    kind = _format_of(path)
    if kind is None:
        raise DataError(f"{path}: unknown format {path.suffix!r}; use {', '.join(FORMATS)}, text formats also with .gz")
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
        elif kind == ".csv":
            yield from _csv_rows(path, problems)
        elif kind == ".json" and _starts_a_list(path):
            yield from _json_list_rows(path)
        else:
            yield from _json_line_rows(path, problems)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); compress it again or drop .gz") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _starts_a_list(path: Path) -> bool:
    with _open(path) as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_line_rows(path: Path, problems: Problems) -> Iterator[Row]:
    with _open(path) as stream:
        # Bytes are split at \n only: U+2028 within a text is not an end of line, and a bad byte has a line number.
        for number, line in enumerate(stream, start=1):
            location = Location(str(path), number)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                fields = parse_json(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                problems.add(location, f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")
            except json.JSONDecodeError as error:
                problems.add(location, f"broken JSON at column {error.colno}: {error.msg}; one object on each line")
            except (ValueError, RecursionError) as error:
                problems.add(location, f"broken JSON: {error}")
            else:
                if isinstance(fields, dict):
                    yield Row(location, fields)
                else:
                    problems.add(location, f"expected a JSON object, found {shown(fields)}")


def _json_list_rows(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        data = stream.read()
    try:
        rows = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{_line_of(data, error.start)}: not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON: {error}") from error
    for number, fields in enumerate(rows, start=1):
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {shown(fields)}")
        yield Row(Location(str(path), number), fields)


def _line_of(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _csv_rows(path: Path, problems: Problems) -> Iterator[Row]:
    with _open(path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{_line_of(data, error.start)}: not UTF-8; save the file as UTF-8") from error
    csv.field_size_limit(_LARGEST_CSV_CELL)  # the default refuses a text above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        location = Location(str(path), reader.line_num + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{location}: broken CSV: {error}; quote cells that hold quotes or line ends") from error
        if not cells:
            continue
        if header is None:
            header = _csv_header(location, cells)
        elif len(cells) != len(header):
            problems.add(location, f"{len(cells)} cells under {len(header)} columns; quote cells that hold commas")
        else:
            yield Row(location, dict(zip(header, cells, strict=True)))


def _csv_header(location: Location, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{location}: the column {name!r} stands twice; rename one")
    return names


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(Location(str(path), number), fields)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file (after row {number}): {error}") from error


def _directory_rows(path: Path, split: str, problems: Problems) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # any fault of a damaged directory, whatever `datasets` raises for it
            raise DataError(f"{path}: not a readable `datasets` directory: {error}") from error
        yield from _dataset_rows(str(path), loaded, split)
        return
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and _format_of(entry))
    if not files:
        raise DataError(f"{path}: holds no data files ({', '.join(FORMATS)}) and is no `datasets` directory")
    names = [file.name.split(".")[0] for file in files]
    if split:
        files = [file for file, name in zip(files, names, strict=True) if name == split]
        if not files:
            raise DataError(f"{path}: no file for the split {split!r}{suggestion(split, names)}; found: {names}")
    by_split = not split and len(files) > 1 and set(names) <= set(SPLITS)
    for file, name in zip(files, names, strict=False):
        for row in _file_rows(file, problems):
            yield _with_split(row, name) if by_split else row


def _with_split(row: Row, split: str) -> Row:
    return row if row.fields.get("split") is not None else Row(row.location, {**row.fields, "split": split})


def _hub_rows(name: str, split: str, hint: str) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, authentication, no such name, a builder's own fault: all end here
        raise DataError(
            f"{name}: neither a local file or directory{hint} nor a data set that could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). "
            f"Check the spelling and, for a hub name, the network and HF_HUB_OFFLINE; or give a local path"
        ) from error
    yield from _dataset_rows(name, loaded, split)


def _dataset_rows(name: str, loaded: Any, split: str) -> Iterator[Row]:
    """Rows of a Dataset or DatasetDict; the splits of a dict become the rows' `split` where all are known."""
    if not hasattr(loaded, "keys"):
        if split:
            raise DataError(f"{name}#{split}: this data set has no splits; leave out #{split}")
        loaded = {"": loaded}
    elif split:
        if split not in loaded:
            raise DataError(f"{name}: no split {split!r}{suggestion(split, loaded)}; it has: {', '.join(loaded)}")
        loaded = {split: loaded[split]}
    by_split = len(loaded) > 1
    if by_split and not set(loaded) <= set(SPLITS):
        unknown = sorted(set(loaded) - set(SPLITS))
        raise DataError(
            f"{name}: splits {', '.join(unknown)} are not {', '.join(SPLITS)}; "
            f"choose one by writing {name}#{unknown[0]}, or several as a list of such names"
        )
    for key, rows in loaded.items():
        source = f"{name}#{key}" if key else name
        for number, fields in enumerate(rows, start=1):
            row = Row(Location(source, number), dict(fields))
            yield _with_split(row, key) if by_split else row
