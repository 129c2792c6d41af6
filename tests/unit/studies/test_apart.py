"""Methods side by side in processes of their own: output, seconds, failures, threads, and what is left to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from equipoise.errors import ConfigError, EquipoiseError
from equipoise.studies import apart, quickstart
from equipoise.studies.apart import default_workers, run_apart
from equipoise.studies.jobs import locked
from equipoise.studies.quickstart import METHODS, Study, run_quickstart


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(out: Path, names: Sequence[str], command: Callable[[str], list[str]], said: list[str]) -> dict[str, tuple]:
    """Two at a time; how each ended, also where one failed."""
    found: dict[str, tuple] = {}
    with locked(out) as lock:
        try:
            run_apart(
                out, names, command, workers=2, lock=lock, say=said.append,
                ended=lambda name, well, seconds: found.update({name: (well, seconds)}),
            )  # fmt: skip
        except EquipoiseError as error:
            found["error"] = (str(error),)
    return found


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "SECONDS_BETWEEN_LOOKS", 0.02)


def test_each_command_runs_once_and_its_lines_are_said_under_its_name(tmp_path: Path) -> None:
    said: list[str] = []
    code = "import os, sys; print('threads', os.environ['OMP_NUM_THREADS']); print('{0} ends', file=sys.stderr)"
    found = run(tmp_path, ["one", "two", "three"], lambda name: python(code.format(name)), said)
    assert set(found) == {"one", "two", "three"} and all(well and seconds > 0 for well, seconds in found.values())
    share = max(1, torch.get_num_threads() // 2)
    for name in found:
        assert f"{name}: {name} ends" in said and f"{name}: threads {share}" in said
        assert f"{name} ends" in (tmp_path / "logs" / f"{name}.log").read_text()
    assert len(said) == 6


def test_a_failure_names_its_reason_and_the_others_finish(tmp_path: Path) -> None:
    codes = {"bad": "raise SystemExit('no space on the moon')", "good": "print('fine')", "late": "print('fine')"}
    found = run(tmp_path, list(codes), lambda name: python(codes[name]), [])
    assert "bad failed: no space on the moon" in found.pop("error")[0]
    assert {name: well for name, (well, _) in found.items()} == {"bad": False, "good": True, "late": True}


def test_a_log_of_an_earlier_attempt_is_not_said_again(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "one.log").write_text("old\n")
    said: list[str] = []
    run(tmp_path, ["one"], lambda name: python("print('new')"), said)
    assert said == ["one: new"]


def test_one_that_is_left_gets_all_threads(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path, ["one"], lambda name: python("import os; print(os.environ['OMP_NUM_THREADS'])"), said)
    assert said == [f"one: {torch.get_num_threads()}"]


def opened(out: Path, command: Callable[[str], list[str]], done: list[str]) -> Study:
    state = {"done": [*done], "stages": {}, "seed": 0, "size": "1m"}
    return Study(out, 0, "1m", say=lambda line: None, command=command, workers=2, state=state)


def test_a_quickstart_leaves_what_is_done_and_counts_the_clock_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shared stages done, and PPO with its completions; what stays is done apart, evaluation here."""
    place = tmp_path / "evaluation" / "completions"
    place.mkdir(parents=True)
    (place / "ppo.jsonl").touch()
    (place / "dpo.jsonl").touch()  # of a training that was stopped before it was done
    asked: list[str] = []

    def command(name: str) -> list[str]:
        asked.append(name)
        return python(f"import time; time.sleep(0.5); open({str(place / f'{name}.jsonl')!r}, 'w')")

    monkeypatch.setattr(quickstart, "evaluate_stage", lambda study, methods: None)
    monkeypatch.setattr(quickstart, "_controls", lambda study: None)
    monkeypatch.setattr(quickstart, "_facts", lambda study: {})
    monkeypatch.setattr(quickstart, "build_report", lambda out: out / "report.html")
    study = opened(tmp_path, command, ["sft", "annotations", "reward", "ppo"])
    study.state["stages"] = dict.fromkeys(study.state["done"], 1.0)
    run_quickstart(study)
    assert set(asked) == {"grpo", "dpo", "base"}
    saved = json.loads((tmp_path / "quickstart.json").read_text())
    assert set(METHODS) <= set(saved["done"])
    longest = max(saved["stages"][name] for name in ("grpo", "dpo"))
    assert longest <= saved["seconds"] < sum(saved["stages"].values())
    asked.clear()
    run_quickstart(study)
    assert not asked
    with locked(tmp_path), pytest.raises(ConfigError, match="is at work there"):
        run_quickstart(study)


def test_seconds_of_an_attempt_that_failed_count(tmp_path: Path) -> None:
    """GRPO fails at first: its stage has the seconds of both attempts, and is done after the second."""
    failing = opened(tmp_path, lambda name: python("import time; time.sleep(0.3); raise SystemExit('no')"), [])
    with locked(tmp_path) as lock, pytest.raises(EquipoiseError, match="grpo failed: no"):
        quickstart._methods_apart(failing, failing.command or python, lock)
    first = failing.state["stages"]["grpo"]
    assert first > 0.3 and not failing.state["done"]
    again = opened(tmp_path, lambda name: python("pass"), [])
    again.state["stages"] = {"grpo": first}
    with locked(tmp_path) as lock:
        quickstart._methods_apart(again, again.command or python, lock)
    assert again.state["stages"]["grpo"] > first and "grpo" in again.state["done"]


def test_a_study_of_an_older_version_counts_its_stages(tmp_path: Path) -> None:
    """They ran one after the other, and nobody kept the clock."""
    state = {"seed": 0, "size": "1m", "stages": {"sft": 2.0, "reward": 3.0}, "done": ["sft", "reward"]}
    (tmp_path / "quickstart.json").write_text(json.dumps(state))
    study = quickstart.open_study(
        tmp_path, seed=0, size="1m", train=quickstart._no_training, make_pairs=quickstart._no_pairs,
        counting=quickstart._no_progress, say=print,
    )  # fmt: skip
    assert study.state["seconds"] == 5.0


def test_two_at_once_only_with_two_cores_and_enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, memory, expected in ((2, 8, 2), (1, 8, 1), (8, 8, 2), (2, 3.9, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(apart, "memory_bytes", lambda memory=memory: memory * 2**30)
        assert default_workers() == expected
