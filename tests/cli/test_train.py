"""`equipoise train` as a command: results on disk, help, progress, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.run_toys import World, differences, metrics

from equipoise.algorithms.run import Run
from equipoise.cli.progress import TrainingProgress, counting

Equipoise = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("algorithm", ["sft", "reward", "grpo"])
def test_a_run_leaves_its_directory(algorithm: str, world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    code, out, errors = equipoise("train", getattr(world, algorithm)("good"), "--out", "run")
    assert code == 0, errors
    assert out == ""  # results are files; what is said goes to stderr
    assert "done: run/model" in errors
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    assert config["algorithm"] == algorithm and config["checkpoint"]["keep"] == 2  # defaults included
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["threads"] == 1 and environment["processes"] == 1
    cost = json.loads((run / "cost.json").read_text())
    assert set(cost["flops"]) == {"generate", "score", "reference", "forward", "backward", "critic"}
    assert cost["wall_s"] > 0 and cost["trained_tokens"] > 0 and cost["flops"]["backward"] > cost["flops"]["forward"]
    assert (run / "model" / "config.json").is_file()
    for step, line in enumerate(metrics(run), start=1):
        assert line["step"] == step
        assert {"loss", "grad_norm", "learning_rate", "time/step", "time/update"} <= line.keys()


def test_overrides_and_default_place(world: World, equipoise: Equipoise, tmp_path: Path) -> None:
    recipe = world.grpo("named")
    assert equipoise("train", recipe, "num_steps=1", "optimizer.learning_rate=2e-3", "sampling.max_tokens=3")[0] == 0
    run = tmp_path / "runs" / "named"
    config = json.loads((run / "config.json").read_text())
    assert (config["num_steps"], config["sampling"]["max_tokens"]) == (1, 3)
    assert metrics(run)[0]["learning_rate"] == 2e-3
    assert equipoise("train", recipe, "num_steps=1", "out=elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "model").is_dir()


def test_piped_progress_is_plain_lines(world: World, equipoise: Equipoise) -> None:
    """First and last step (and one every ten seconds), nothing that moves a cursor."""
    _, _, errors = equipoise("train", world.sft("piped"), "--out", "run")
    progress = [line for line in errors.splitlines() if line.startswith("step ")]
    assert re.fullmatch(r"step 1/5  loss \d\.\d+  about \d+ s left", progress[0])
    assert re.fullmatch(r"step 5/5  loss \d\.\d+  validation/loss \d\.\d+", progress[-1])
    said = "\n".join(line for line in errors.splitlines() if "weights" not in line and "shards" not in line)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)


class FakeRun:
    """What progress reads of a run."""

    first_step, num_steps, is_main, listener = 10, 40, True, None
    budget_share: float | None = None


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the thirty steps that a resumed run has to do took 20 s: 28 more take 280 s, 4.7 minutes."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with TrainingProgress(FakeRun()) as progress:
        for step, at in ((11, 105.0), (12, 120.0), (13, 121.0)):
            now[0] = at
            progress({"step": step, "loss": 0.5, "kl": None, "other": 3})
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["step 11/40  loss 0.5  about 2.4 min left", "step 12/40  loss 0.5  about 4.7 min left"]


@pytest.mark.parametrize(
    ("first", "shares", "shown"),
    [
        # A tenth of the budget in 10 s, then a fifth in 10 s: 0.7 of it takes 35 s, long before the 40 steps are done.
        (0, (0.1, 0.3), ["about 90 s left", "about 35 s left"]),
        # A resumed run: what its first step spent is not known, then as above; until then the steps tell.
        (10, (0.1, 0.3), ["about 4.8 min left", "about 35 s left"]),
        # A budget that the 40 steps never spend: 38 more (or 28) at 10 s each.
        (0, (0.001, 0.002), ["about 6.5 min left", "about 6.3 min left"]),
        # Over the budget: this step was the last.
        (0, (0.5, 1.2), ["about 10 s left", "about 0 s left"]),
    ],
)
def test_time_left_is_that_of_the_budget_where_it_ends_first(
    first: int, shares: tuple[float, float], shown: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = FakeRun()
    run.first_step = first
    with TrainingProgress(run) as progress:
        for step, share in enumerate(shares, start=first + 1):
            now[0] += 10.0
            run.budget_share = share
            progress({"step": step, "loss": 0.5})
    assert [line.partition("loss 0.5  ")[2] for line in capsys.readouterr().err.splitlines()] == shown


def test_counting_says_when_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("scoring", 5) as advance:
        advance(2)
        advance(3)
    assert capsys.readouterr().err == "scoring: 5/5\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with TrainingProgress(FakeRun()) as progress:
        progress({"step": 40, "loss": 0.25})
    with counting("scoring", 5) as advance:
        advance(5)
    shown = capsys.readouterr().err
    assert "step 40/40  loss 0.25" in shown and "scoring" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    """What makes it answer at once; a limit in seconds would depend on the machine."""
    script = (
        "import sys; from equipoise.cli.main import run\n"
        f"sys.argv = ['equipoise', *{arguments!r}]\n"
        "try:\n    run()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'accelerate', 'pyarrow', 'scipy', 'peft'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert "train" in done.stdout


def test_unknown_option_is_wrong_input(equipoise: Equipoise, world: World) -> None:
    code, _, errors = equipoise("train", world.grpo("good"), "--bogus")
    assert code == 2
    assert "No such option: --bogus" in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_resume(
    number: signal.Signals,
    code: int,
    world: World,
    equipoise: Equipoise,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = world.grpo("signalled")
    log = Run.log

    def signals(run: Run, step: int, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            os.kill(os.getpid(), number)
        return log(run, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", signals)
        found, _, errors = equipoise("train", recipe, "--out", "run")
    assert found == code
    assert f"WARNING {number.name}: finishing this step, then saving" in errors
    assert f"stopped by {number.name} after step 2; everything is saved. Resume with --resume --out run" in errors
    assert "Traceback" not in errors
    assert signal.getsignal(number) == (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    assert equipoise("train", recipe, "--out", "run", "--resume")[0] == 0
    assert equipoise("train", recipe, "--out", "unbroken")[0] == 0
    kept = [name for name in differences(tmp_path / "run", tmp_path / "unbroken") if "step_000002" not in name]
    assert kept == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(
    number: signal.Signals,
    code: int,
    world: World,
    equipoise: Equipoise,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Run.log

    def signals(run: Run, step: int, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return log(run, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", signals)
        found, _, errors = equipoise("train", world.grpo("twice"), "--out", "run")
    assert found == code
    assert "Traceback" not in errors
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert equipoise("train", world.grpo("twice"), "--out", "run", "--resume")[0] == 0


def test_the_process_itself(world: World, tmp_path: Path) -> None:
    """`python -m equipoise` in a process of its own: exit code and plain output of a terminated run."""
    recipe = world.grpo("process", num_steps=400, checkpoint={"every": 1000}, completions_every=1000)
    command = [sys.executable, "-m", "equipoise", "train", str(recipe), "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    while not file.is_file() or len(metrics(tmp_path / "run")) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.terminate()
    errors = process.communicate()[1]
    assert process.returncode == 143
    stopped = len(metrics(tmp_path / "run"))
    assert errors.splitlines()[-1] == (
        f"equipoise: stopped by SIGTERM after step {stopped}; everything is saved. Resume with --resume --out run"
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", errors)
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:06d}" / "state.safetensors").is_file()


def test_one_process_where_several_were_asked_for(
    world: World, equipoise: Equipoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --cpu --num_processes 2` without MPI: one process, told by its environment alone."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    code, _, errors = equipoise("train", world.grpo("alone", num_steps=1), "--out", "run")
    assert code == 0
    assert "WARNING accelerate launch asked for several processes and started one: --cpu needs MPI" in errors
