"""Records out of rows: what is accepted, and every bad row named in one error."""

import json
import subprocess
import sys

import pytest

from equipoise.config import DataConfig
from equipoise.data import load_demonstrations, load_pairs, load_prompts, load_scored, undeclared_aspects
from equipoise.errors import DataError

GOOD = {"prompt": "p", "response": "r", "scores": {"a": 1}}


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, equipoise.data; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'jinja2') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_prompts_keep_their_fields_and_ignore_others(write_jsonl):
    messages = [{"role": "user", "content": "Hi"}]
    path = write_jsonl(
        [
            {"prompt": "", "kind": "benign", "category": "c", "source": "s", "unheard_of": 3},
            {"prompt": messages, "kind": None},
            {"prompt": "x", "kind": "unlabelled", "split": "test"},
        ]
    )
    first, second, third = load_prompts(path)
    assert (first.prompt, first.kind, first.category, first.source, first.row) == ("", "benign", "c", "s", 1)
    assert (second.prompt, second.kind, second.location) == (messages, "unlabelled", f"{path}:2")
    assert third.split == "test"


def test_pairs_and_demonstrations(write_jsonl):
    pair = load_pairs(write_jsonl([{"prompt": "p", "chosen": "c", "rejected": "r", "source": "s"}]))[0]
    assert (pair.prompt, pair.chosen, pair.rejected, pair.source) == ("p", "c", "r", "s")
    reply = [{"role": "assistant", "content": "c"}]
    assert load_pairs(write_jsonl([{"prompt": "p", "chosen": reply, "rejected": "r"}]))[0].chosen == "c"
    shown = load_demonstrations(write_jsonl([{"prompt": "p", "response": "", "kind": "adversarial"}]))[0]
    assert (shown.prompt, shown.response, shown.kind) == ("p", "", "adversarial")


def test_limit_and_several_sources(write_jsonl):
    one = write_jsonl([{"prompt": str(n)} for n in range(5)], "one.jsonl")
    two = write_jsonl([{"question": "q"}, {"question": "r"}], "two.jsonl")
    sources = [DataConfig(path=str(one), limit=2), DataConfig(path=str(two), columns={"prompt": "question"})]
    assert [record.prompt for record in load_prompts(sources)] == ["0", "1", "q", "r"]
    assert [record.prompt for record in load_prompts([one, str(one)], limit=1)] == ["0", "0"]
    with pytest.raises(DataError, match="no data source given"):
        load_prompts([])


def test_aspect_prefix_keeps_joined_sets_apart(write_jsonl):
    path = write_jsonl([GOOD])
    sources = [DataConfig(path=str(path), aspect_prefix="one/"), DataConfig(path=str(path), aspect_prefix="two/")]
    assert [record.scores for record in load_scored(sources)] == [{"one/a": 1.0}, {"two/a": 1.0}]
    assert load_scored(path, aspect_prefix="x/")[0].scores == {"x/a": 1.0}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": "4"}, r"`scores\.a` is a string, '4'; write a number, or null"),
        ({"a": True}, r"`scores\.a` is a boolean, True"),
        ({"a": [1]}, r"`scores\.a` is a list"),
        ({"a": float("nan")}, r"`scores\.a` is nan; write a finite number, or null"),
        ({"a": float("inf")}, r"`scores\.a` is inf"),
        ({"a": -float("inf")}, r"`scores\.a` is -inf"),
        ({"a": 10**400}, r"`scores\.a` is inf"),
        ({"": 1}, "aspect without a name"),
        ({}, "`scores` is empty"),
        (None, "field `scores` is null"),
        ([1], r"`scores` must map aspects to numbers, found \[1\]"),
        (3, "`scores` must map aspects to numbers, found 3"),
    ],
)
def test_bad_scores(write_jsonl, scores, message):
    path = write_jsonl([GOOD, {**GOOD, "scores": scores}])
    with pytest.raises(DataError, match=message) as error:
        load_scored(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_null_scores_are_missing_ones(write_jsonl):
    path = write_jsonl([GOOD, {**GOOD, "scores": {"a": None, "b": 2}}])
    assert [record.scores for record in load_scored(path)] == [{"a": 1.0}, {"a": None, "b": 2.0}]


@pytest.mark.parametrize("cell", ["nan", "inf", "high", "True"])
def test_bad_scores_in_csv(tmp_path, cell):
    path = tmp_path / "d.csv"
    path.write_text(f"prompt,response,scores.a\np,r,1\np,r,\np,r,{cell}\n")
    with pytest.raises(DataError, match=r"d\.csv:4: `scores\.a` is"):
        load_scored(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3}, "`prompt` must be a text or a list of messages, found 3"),
        ({"prompt": None, "text": "x"}, r"field `prompt` is null \(did you mean 'text'\?\)"),
        ({"promt": "x"}, r"field `prompt` is missing \(did you mean 'promt'\?\); the row has: promt"),
        ({"question": "x"}, r"did you mean 'question'\?.*\n.*map it: `columns: \{prompt: <its name>\}`"),
        ({}, "field `prompt` is missing; the row has: nothing"),
        ({"prompt": []}, "a list without messages"),
        ({"prompt": ["x"]}, r"`prompt\[0\]` must be"),
        ({"prompt": [{"role": "user", "content": None}]}, r"`prompt\[0\]` must be"),
        ({"prompt": [{"role": "usr", "content": "x"}]}, r"`prompt\[0\]\.role` is 'usr' \(did you mean 'user'\?\)"),
        ({"prompt": [{"content": "x"}]}, r"`prompt\[0\]\.role` is None"),
        ({"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "nothing to answer"),
        ({"prompt": "\ud800"}, "half of a surrogate pair at character 1"),
        ({"prompt": [{"role": "user", "content": "a\ud800"}]}, r"`prompt\[0\]\.content` holds half of a surrogate"),
        ({"prompt": "x", "kind": "bening"}, r"unknown kind 'bening' \(did you mean 'benign'\?\)"),
        ({"prompt": "x", "kind": ["benign"]}, r"unknown kind \['benign'\]"),
        ({"prompt": "x", "split": "val"}, r"unknown split 'val' \(did you mean 'validation'\?\)"),
        ({"prompt": "x", "split": "tset"}, r"unknown split 'tset' \(did you mean 'test'\?\)"),
        ({"prompt": "x", "category": 3}, "`category` must be a text or null, found 3"),
    ],
)
def test_bad_prompts(write_jsonl, row, message):
    path = write_jsonl([{"prompt": "good"}, row])
    with pytest.raises(DataError, match=message) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("load", "row", "message"),
    [
        (load_scored, {"prompt": "p", "scores": {"a": 1}}, "field `response` is missing"),
        (load_scored, {"prompt": "p", "response": 3, "scores": {"a": 1}}, "`response` must be a text, found 3"),
        (load_demonstrations, {"prompt": "p", "output": "x"}, r"`response` is missing \(did you mean 'output'\?\)"),
        (load_demonstrations, {"prompt": "p", "response": "x", "kind": "bad"}, "unknown kind 'bad'"),
        (load_pairs, {"prompt": "p", "chosen": "x"}, "field `rejected` is missing"),
    ],
)
def test_bad_rows_of_the_other_kinds(write_jsonl, load, row, message):
    with pytest.raises(DataError, match=message):
        load(write_jsonl([row]))


def test_every_bad_row_is_reported_in_one_error_and_good_ones_are_not(write_jsonl):
    path = write_jsonl([{"prompt": "good"}, "{broken", {"prompt": 1, "kind": "x"}, {"prompt": "good"}, {"p": 1}])
    with pytest.raises(DataError) as error:
        load_prompts(path)
    lines = str(error.value).splitlines()
    numbers = [line.removeprefix(f"{path}:").split(":")[0] for line in lines if line.startswith(str(path))]
    assert numbers == ["2", "3", "3", "5"]


def test_at_most_twenty_are_shown_then_a_count(write_jsonl):
    with pytest.raises(DataError) as error:
        load_prompts(write_jsonl([{"prompt": 1}] * 27))
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 7 more bad rows"
    with pytest.raises(DataError) as error:
        load_prompts(write_jsonl([{"prompt": 1}] * 20))
    assert len(str(error.value).splitlines()) == 20


def test_bad_rows_of_several_files_come_together(write_jsonl):
    one, two = write_jsonl([{"prompt": 1}], "one.jsonl"), write_jsonl([{"prompt": 2}], "two.jsonl")
    with pytest.raises(DataError, match=r"one\.jsonl:1: (.|\n)*two\.jsonl:1: "):
        load_prompts([one, two])


def test_declared_aspects_must_have_scores(write_jsonl):
    path = write_jsonl([{**GOOD, "scores": {"politeness": 1, "safety": None}}] * 2)
    assert len(load_scored(path, aspects=["politeness"])) == 2
    with pytest.raises(DataError, match="aspect 'safety': all scores are missing") as error:
        load_scored(path, aspects=["politeness", "safety"])
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=r"aspect 'politness' is in no row \(did you mean 'politeness'\?\)"):
        load_scored(path, aspects=["politness"])


def test_undeclared_aspects_are_told(write_jsonl):
    records = load_scored(write_jsonl([GOOD, {**GOOD, "scores": {"b": None, "c": 1}}]))
    assert undeclared_aspects(records, ["a", "z"]) == ["b", "c"]
    assert undeclared_aspects(records, ["a", "b", "c"]) == []


def test_records_are_frozen(write_jsonl):
    record = load_prompts(write_jsonl([{"prompt": "p"}]))[0]
    with pytest.raises(AttributeError):
        record.prompt = "q"  # type: ignore[misc]


def test_long_values_are_cut_in_messages(write_jsonl):
    with pytest.raises(DataError) as error:
        load_prompts(write_jsonl([{"prompt": {"text": "x" * 5000}}]))
    assert len(str(error.value)) < 400
    assert json.dumps("x" * 100) not in str(error.value)
