"""Every form a preference pair may come in, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from equipoise.data import load_pairs, validate_data
from equipoise.errors import DataError

USER = {"role": "user", "content": "how do i"}
USR = {"role": "usr", "content": "x"}
SYSTEM = {"role": "system", "content": "be kind"}
GOOD = {"role": "assistant", "content": "please go"}
BAD = {"role": "assistant", "content": "no"}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "how do i", "chosen": "please go", "rejected": "no"}, "how do i"),
        ({"prompt": "how do i", "chosen": [GOOD], "rejected": [BAD]}, "how do i"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": "no"}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": "please go", "rejected": "no"}, [SYSTEM, USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        (
            {"chosen": [SYSTEM, USER, BAD, USER, GOOD], "rejected": [SYSTEM, USER, BAD, USER, BAD]},
            [SYSTEM, USER, BAD, USER],
        ),
        ({"prompt": "how do i", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "how do i"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": "no"}, [USER]),
        ({"prompt": None, "chosen": [{**USER, "name": None}, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": "", "chosen": "please go", "rejected": "no"}, ""),
    ],
)
def test_forms(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    record = load_pairs(jsonl(tmp_path / "d.jsonl", row))[0]
    assert (record.prompt, record.chosen, record.rejected) == (prompt, "please go", "no")
    assert not record.chosen_truncated and not record.rejected_truncated


def test_truncation_marks_are_read(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_truncated": None, "rejected_truncated": True}
    record = load_pairs(jsonl(tmp_path / "d.jsonl", row))[0]
    assert (record.chosen_truncated, record.rejected_truncated) == (False, True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "field `rejected` is missing"),
        ({"chosen": "p a", "rejected": "p b"}, "`prompt` is missing.*not texts or lone replies; add `prompt`"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "`prompt` is missing.*lone replies"),
        ({"chosen": [USER, GOOD], "rejected": "no"}, "`prompt` is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "`chosen` and `rejected` are the same, 'a'"),
        ({"prompt": "p", "chosen": "a ", "rejected": "a"}, "are the same"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "`rejected` is empty; a pair needs two responses"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "`chosen` is empty"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, r"`chosen` \(2 messages\).*differ from message 0 on"),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, BAD]}, r"`rejected` \(2\) differ from message 1"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "differ from message 1 on"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": "no"}, "before the reply in `chosen` is not `prompt`"),
        ({"prompt": "p", "chosen": [], "rejected": "x"}, r"`chosen` must be a text or a list of messages, found \[\]"),
        ({"prompt": "p", "chosen": 3, "rejected": "x"}, "`chosen` must be a text or a list of messages, found 3"),
        ({"prompt": "p", "chosen": [USER], "rejected": "x"}, "`chosen` must end with the reply to compare"),
        ({"prompt": "p", "chosen": json.dumps([GOOD]), "rejected": "x"}, "`chosen` is a text that holds messages"),
        ({"chosen": str([USER, GOOD]), "rejected": str([USER, BAD])}, "`chosen` is a text that holds messages"),
        ({"chosen": [USR, GOOD], "rejected": [USR, BAD]}, r"`chosen\[0\].role` is 'usr'"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_truncated": "yes"}, "must be true or false"),
        ({"prompt": "p", "chosen": "a\ud800", "rejected": "b"}, "half of a surrogate"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "`prompt` must be a text or a list of messages"),
    ],
)
def test_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(DataError, match=message) as error:
        load_pairs(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_cells_that_hold_messages(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["chosen", "rejected"], [json.dumps([USER, GOOD]), json.dumps([USER, BAD])]])
    record = load_pairs(tmp_path / "d.csv")[0]
    assert (record.prompt, record.chosen, record.rejected) == ([USER], "please go", "no")


def test_conversations_without_a_prompt_are_pairs_to_validate_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert validate_data(path).record_kind == "pairs"
