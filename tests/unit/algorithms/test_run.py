"""The run directory: what is written when, what is refused, what a resume takes back."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from equipoise.algorithms import run as module
from equipoise.algorithms.checkpoint import saved_steps
from equipoise.algorithms.run import Interrupted, Run
from equipoise.config import recipe_from_mapping
from equipoise.errors import CheckpointError, ConfigError, EquipoiseError

RECIPE: dict[str, Any] = {"algorithm": "sft", "policy": {"model": "m"}, "data": "d", "checkpoint": {"every": 2}}


def open_run(out: Path, *, resume: bool = False, **changes: Any) -> Run:
    """A run of a recipe nothing is trained for."""
    return Run(out, recipe_from_mapping(RECIPE | changes), resume=resume)


def steps(run: Run, first: int, last: int, total: int = 9) -> None:
    """Log, write completions and save as an algorithm does; the state is the step's number."""
    for step in range(first, last + 1):
        with run.timed("update"):
            run.count(trained_tokens=10, generated_tokens=7, forward=1e9, backward=2e9)
        run.log(step, {"loss": 1 / step, "nothing": None})
        run.write_completions(step, {"prompt": ["a"], "completion": [str(step)]})
        run.maybe_checkpoint(step, total, lambda step=step: {"x": torch.tensor([step])}, {"value": step})


def logged(out: Path) -> list[int]:
    """Steps in metrics.jsonl."""
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_at_the_steps_asked_for_and_at_the_end(tmp_path: Path) -> None:
    run = open_run(tmp_path / "r", checkpoint={"every": 4, "keep": 9})
    steps(run, 1, 9)
    assert saved_steps(run.checkpoints) == [4, 8, 9]


def test_resume_goes_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "r"
    steps(open_run(out), 1, 5)
    assert logged(out) == [1, 2, 3, 4, 5]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # died while appending
    (out / "completions" / ".step_000006.tmp").write_bytes(b"half")
    (out / ".cost.json.tmp").write_text("{")
    (out / ".model.123.tmp").mkdir()
    (out / ".model.123.old.tmp").mkdir()
    (out / "checkpoints" / ".tmp-step_000006").mkdir()
    run = open_run(out, resume=True)
    assert run.first_step == 4
    restored = run.restore()
    assert restored is not None
    assert (restored.step, restored.values["value"], restored.tensors["x"].tolist()) == (4, 4, [4])
    assert logged(out) == [1, 2, 3, 4]
    assert sorted(path.name for path in (out / "completions").iterdir()) == [
        f"step_{n:06d}.parquet" for n in range(1, 5)
    ]
    assert not list(out.glob(".*")) and saved_steps(run.checkpoints) == [2, 4]
    assert not list(run.checkpoints.glob(".tmp*"))


def test_costs_of_replayed_steps_count_once(tmp_path: Path) -> None:
    out = tmp_path / "r"
    steps(open_run(out), 1, 5)
    run = open_run(out, resume=True)
    steps(run, 5, 9)
    cost = json.loads((out / "cost.json").read_text())
    assert (cost["trained_tokens"], cost["generated_tokens"]) == (90, 63)
    assert (cost["flops"]["forward"], cost["flops"]["backward"], cost["flops"]["critic"]) == (9e9, 18e9, 0)
    assert cost["peak_rss_mb"] > 50 and cost["wall_s"] >= cost["update_s"] > 0 and cost["cpu_s"] > 0


def test_a_fresh_run_where_one_died_before_saving(tmp_path: Path) -> None:
    out = tmp_path / "r"
    steps(open_run(out), 1, 1)
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        open_run(out)
    run = open_run(out, resume=True)
    assert (run.first_step, run.restore()) == (0, None)
    assert logged(out) == []


def test_a_changed_recipe_is_refused_naming_the_keys(tmp_path: Path) -> None:
    out = tmp_path / "r"
    steps(open_run(out), 1, 2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    changes = {"seed": 3, "policy": {"model": "other", "lora": {"r": 2}}}
    with pytest.raises(ConfigError) as caught:
        open_run(out, resume=True, **changes)
    message = str(caught.value)
    for part in (
        "policy.model (was 'm', now 'other')",
        "policy.lora (was None",
        "seed (was 0, now 3)",
        "undo the change",
    ):
        assert part in message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    moved = Run(out, recipe_from_mapping(RECIPE | {"out": "elsewhere"}), resume=True)
    assert moved.first_step == 2  # where it lies changes nothing


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[1]", '{"algorithm": "other"}', '{"algorithm": null}'])
def test_the_config_of_something_else_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="exists and is not an Equipoise run directory; give another --out"):
            open_run(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == content


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        open_run(tmp_path)


def test_an_empty_directory_and_what_a_dying_start_leaves(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".config.json.tmp").write_text("{")
    assert open_run(tmp_path).first_step == 0
    (tmp_path / "empty").mkdir()
    assert open_run(tmp_path / "empty").first_step == 0


def test_checkpoints_without_a_config_are_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "r"
    steps(open_run(out), 1, 2)
    (out / "config.json").unlink()
    with pytest.raises(ConfigError, match="not an Equipoise run directory"):
        open_run(out)
    assert saved_steps(out / "checkpoints") == [2]


def test_a_damaged_line_of_metrics_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "r"
    steps(open_run(out), 1, 3)
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text.replace('{"step": 2', '"step": 2'))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: a line is not what was logged"):
        open_run(out, resume=True)


def test_what_is_logged(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    heard: list[dict[str, Any]] = []
    run.listener = heard.append
    with run.timed("update"), run.timed("score"):
        pass
    with run.timed("update"):
        pass
    line = run.log(1, {"loss": 0.5, "kl": None})
    assert list(line) == ["step", "loss", "kl", "time/score", "time/update", "time/step"]
    assert line["time/step"] == pytest.approx(line["time/score"] + line["time/update"], abs=2e-6)
    assert heard == [line] == [json.loads((tmp_path / "metrics.jsonl").read_text())]
    assert run.log(2, {"loss": 0.4})["time/step"] == 0  # timers belong to their step
    spoiled = run.log(3, {"loss": float("nan"), "kl": float("inf"), "skipped": 1})
    assert (spoiled["loss"], spoiled["kl"], spoiled["skipped"]) == (None, None, 1)
    assert logged(tmp_path) == [1, 2, 3]


def test_completions_keep_types(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.write_completions(12, {"prompt": ["a", "ü\n"], "score/x": [None, 0.5], "group": [0, 0]})
    table = pq.read_table(tmp_path / "completions" / "step_000012.parquet")
    assert table.to_pydict() == {"prompt": ["a", "ü\n"], "score/x": [None, 0.5], "group": [0, 0]}


def test_warnings_are_said_once_in_a_run_and_its_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        module.logger, "warning", lambda message, *rest: said.append(message % rest if rest else message)
    )
    run = open_run(tmp_path / "r")
    run.warn_once("kl", "KL is high")
    run.warn_once("kl", "KL is high")
    steps(run, 1, 2)
    open_run(tmp_path / "r", resume=True).warn_once("kl", "KL is high")
    assert said == ["KL is high"]


def test_complete_means_model_and_checkpoint(tmp_path: Path) -> None:
    run = open_run(tmp_path / "r")
    steps(run, 1, 9)
    assert not run.is_complete
    run.finish(lambda directory: directory.mkdir())
    assert open_run(tmp_path / "r", resume=True).is_complete


@pytest.mark.parametrize("what", ["log", "completions", "finish", "cost"])
def test_disk_errors_name_the_file(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    actions = {
        "log": ("metrics.jsonl", lambda: run.log(1, {}), (Path, "open")),
        "completions": (
            "step_000001.parquet",
            lambda: run.write_completions(1, {"a": [1]}),
            (module.pq, "write_table"),
        ),
        "finish": ("model", lambda: run.finish(full), None),
        "cost": ("cost.json", lambda: run.finish(lambda directory: None), (module, "flush_to_disk")),
    }
    name, action, patched = actions[what]
    if patched is not None:
        monkeypatch.setattr(*patched, full)
    with pytest.raises(CheckpointError, match=rf"{name}: could not write: .*No space left on device; free space"):
        action()
    assert not (tmp_path / ".cost.json.tmp").exists()


# -- signals ---------------------------------------------------------------------------------------------------------


def test_handlers_are_put_back(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), run.stopping_cleanly():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_at_the_last_step_is_a_finished_run(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with run.stopping_cleanly():
        os.kill(os.getpid(), signal.SIGTERM)
        steps(run, 9, 9)
    assert saved_steps(run.checkpoints) == [9]


def test_a_signal_saves_where_nothing_was_due(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(Interrupted) as caught, run.stopping_cleanly():
        os.kill(os.getpid(), signal.SIGINT)
        steps(run, 1, 9)
    assert saved_steps(run.checkpoints) == [1]
    assert caught.value.exit_code == 130
    assert str(caught.value) == (
        f"stopped by SIGINT after step 1; everything is saved. Resume with --resume --out {tmp_path}"
    )


def test_other_threads_leave_signals_alone(tmp_path: Path) -> None:
    run, reached = open_run(tmp_path), []

    def work() -> None:
        with run.stopping_cleanly():
            reached.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [True]


# -- processes -------------------------------------------------------------------------------------------------------


def test_one_process_needs_no_communication(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    rows = torch.arange(3)
    assert run.gathered(rows) is rows
    assert (run.total(2.5), run.largest(7), run.totals({"a": 1.0})) == (2.5, 7, {"a": 1.0})
    assert (run.rank, run.num_processes, run.is_main) == (0, 1, True)
    with pytest.raises(ZeroDivisionError), run.failing_together():
        raise ZeroDivisionError


def test_a_fault_of_another_process_carries_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process would see if process 1 of 2 had failed."""
    run = open_run(tmp_path)
    monkeypatch.setattr(Run, "num_processes", property(lambda _: 2))
    monkeypatch.setattr(run, "total", lambda value: value + 1)
    monkeypatch.setattr(module, "gather_object", lambda mine: [*mine, ("d.jsonl:3: bad", 2)])
    with pytest.raises(EquipoiseError, match=r"^process 1: d\.jsonl:3: bad$") as caught, run.failing_together():
        pass
    assert caught.value.exit_code == 2
    with pytest.raises(ZeroDivisionError), run.failing_together():  # its own fault comes first
        raise ZeroDivisionError
