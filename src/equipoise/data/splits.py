"""Training, validation and test rows that share no prompt, the same on every machine and in every order of rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from equipoise.data.problems import SHOWN, shown
from equipoise.data.records import SPLITS, DemonstrationRecord, PairRecord, Prompt, Record, ScoredRecord
from equipoise.errors import ConfigError, DataError

R = TypeVar("R", bound=Record)


def split_records(records: Sequence[R], *, validation: float = 0.1, test: float = 0.1, seed: int) -> dict[str, list[R]]:
    """`{"train", "validation", "test"}`, records in their given order; rows with one prompt stay together.

    An empty prompt says nothing, so those rows are grouped by their response. Groups are ordered by a hash of seed and
    text, and fill test, then validation, up to their share of the rows (0 to 1, at least one row where it is above 0);
    a group too large for the rest of a share is passed over. Neither the order of rows nor the process matters. Rows
    that carry a `split` keep it; the shares are then ignored.

    Raises ConfigError (shares out of range) and DataError (some rows with a split and some without; too few prompts).
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ConfigError(f"validation {validation} and test {test} must be shares from 0 to 1 with a sum below 1")
    with_split = sum(record.split is not None for record in records)
    if with_split:
        _refuse_mixture(records, with_split)
        return {name: [record for record in records if record.split == name] for name in SPLITS}
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_group_key(record), []).append(index)
    held_out = {"test": test, "validation": validation}
    needed = 1 + sum(share > 0 for share in held_out.values())
    if records and len(groups) < needed:
        raise DataError(
            f"{len(records)} rows with {len(groups)} distinct prompts cannot be split into train, "
            f"validation {validation} and test {test} without sharing a prompt; add prompts or set a share to 0"
        )
    free = sorted(groups, key=lambda key: (_hash(seed, key), key))
    assigned: dict[str, str] = {}
    for name, share in held_out.items():
        if share > 0 and records:
            needed -= 1  # the splits still to be filled, training among them, get a prompt each at least
            chosen = _fill(free, groups, max(1, math.floor(share * len(records) + 0.5)), len(free) - needed)
            assigned |= dict.fromkeys(chosen, name)
            free = [key for key in free if key not in assigned]
    result: dict[str, list[R]] = {name: [] for name in SPLITS}
    for record in records:
        result[assigned.get(_group_key(record), "train")].append(record)
    return result


def _fill(free: list[str], groups: dict[str, list[int]], target: int, most: int) -> list[str]:
    """Keys of at most `most` groups for a split of `target` rows; the smallest group where none is small enough."""
    chosen: list[str] = []
    taken = 0
    for key in free:
        if len(chosen) < most and taken + len(groups[key]) <= target:
            chosen.append(key)
            taken += len(groups[key])
    return chosen or [min(free, key=lambda key: len(groups[key]))]


def _refuse_mixture(records: Sequence[Record], with_split: int) -> None:
    if with_split == len(records):
        return
    bare = [record.location or f"row {index}" for index, record in enumerate(records, 1) if record.split is None]
    more = f" and {len(bare) - SHOWN} more" if len(bare) > SHOWN else ""
    raise DataError(
        f"{with_split} rows have a `split` and {len(bare)} have none: {', '.join(bare[:SHOWN])}{more}; "
        "give every row a split, or none"
    )


def prompt_text(prompt: Prompt) -> str:
    """One text for a prompt, by which equal ones are found; a single user message equals its text."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def response_text(record: Record) -> str:
    """One text for what answers the prompt: a response, or the two of a pair."""
    if isinstance(record, PairRecord):
        return json.dumps([record.chosen, record.rejected], ensure_ascii=False)
    return record.response if isinstance(record, ScoredRecord | DemonstrationRecord) else ""


def _group_key(record: Record) -> str:
    text = prompt_text(record.prompt)
    return f"prompt:{text}" if text else f"response:{response_text(record)}"


def _hash(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode()).digest()


@dataclass(frozen=True, slots=True)
class CrossSplitDuplicate:
    """A prompt (`what` is "prompt") or a prompt with its response ("row") that stands in more than one split."""

    what: str
    text: str
    locations: dict[str, list[str]]

    def __str__(self) -> str:
        places = "; ".join(f"{split}: {', '.join(rows[:3])}" for split, rows in self.locations.items())
        return f"the same {self.what} {shown(self.text)} in {places}"


def cross_split_duplicates(splits: Mapping[str, Sequence[Record]]) -> list[CrossSplitDuplicate]:
    """Prompts (not the empty one) and whole rows found in more than one split: results on them are not held out.

    A row found twice is reported as a row only, unless its prompt also stands with other responses across splits.
    """
    prompts: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for split, records in splits.items():
        for index, record in enumerate(records):
            place = record.location or f"row {index + 1}"
            of_prompt = prompts.setdefault(prompt_text(record.prompt), {})
            of_prompt.setdefault(split, []).append((response_text(record), place))
    found: list[CrossSplitDuplicate] = []
    for prompt, by_split in prompts.items():
        rows: dict[str, dict[str, list[str]]] = {}
        for split, answers in by_split.items():
            for response, place in answers:
                rows.setdefault(response, {}).setdefault(split, []).append(place)
        repeated = {response: places for response, places in rows.items() if len(places) > 1}
        for response, places in repeated.items():
            what = "row" if response else "prompt"
            found.append(CrossSplitDuplicate(what, f"{prompt} {response}".strip(), places))
        if prompt and len(by_split) > 1 and len(repeated) < len(rows):
            places = {split: [place for _, place in answers] for split, answers in by_split.items()}
            found.append(CrossSplitDuplicate("prompt", prompt, places))
    return found
